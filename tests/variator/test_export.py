"""`torch.export` and ONNX of an encoder with a plugin: any batch and length, padding exact, nothing cut off."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn

from peft_variator import VariatorConfig, exported_ratio, set_compression_ratio, using_ratio
from tests.tiny_models import BY_NAME, Case, by_name


# With one block: two take twice as long to export.
BERT, VIT = (
    replace(BY_NAME[name], config=BY_NAME[name].config | {"num_hidden_layers": 1}) for name in ("bert", "vit")
)
T5 = replace(BY_NAME["t5-encoder"], config=BY_NAME["t5-encoder"].config | {"num_layers": 1})
KEPT = [20, 21]
HAS_NOTES = hasattr(torch.fx.traceback, "annotate")  # which torch 2.8 has not
TEXT_SHAPE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, **fields)).eval()


def text(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch whose first sequence is half padding."""
    ids = BERT.inputs(batch, length, seed)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def crowded() -> dict[str, Tensor]:
    """Every other token is kept."""
    ids = torch.full((2, 40), 15)
    ids[:, ::2] = KEPT[0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"input_ids": TEXT_SHAPE, "attention_mask": TEXT_SHAPE}
    with torch.no_grad():
        return torch.export.export(model, (), text(2, 12), dynamic_shapes=shapes)


def assert_same_at_real_tokens(found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> None:
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [T5, *(pytest.param(case, marks=pytest.mark.slow) for case in (BERT, BY_NAME["mpnet"]))],
    ids=by_name,
)
def test_batch_and_length_stay_free(case: Case) -> None:
    model = with_plugin(case, keep_token_ids=KEPT)
    program = exported(model.get_base_model()).module()
    assert exported_ratio(program) == (4 if HAS_NOTES else None)
    with torch.no_grad():
        for batch, length in ((1, 5), (3, 33), (2, 12)):
            inputs = text(batch, length, seed=length)
            expected = model(**inputs).last_hidden_state
            assert_same_at_real_tokens(program(**inputs).last_hidden_state, expected, inputs)


@pytest.mark.skipif(not HAS_NOTES, reason="this torch writes no notes on programs")
@pytest.mark.slow
def test_a_program_knows_its_ratio() -> None:
    model = with_plugin(BERT, compression_ratio=8)
    model.set_compression_ratio(3)
    program = exported(model.get_base_model())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for each in (program, program.module(), loaded, loaded.module()):
        assert exported_ratio(each) == 3
        with pytest.raises((TypeError, ValueError), match="k = 3"), using_ratio(each, 3):
            pass
        with pytest.raises((TypeError, ValueError), match="k = 3"):
            set_compression_ratio(each, 2)


@pytest.mark.slow
def test_a_peft_model_with_a_task_is_exported_as_it_is() -> None:
    model = with_plugin(BY_NAME["bert-sequence"], task_type=TaskType.SEQ_CLS, keep_token_ids=KEPT)
    program = exported(model).module()
    inputs = text(3, 21)
    with torch.no_grad():
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [pytest.param(4, marks=pytest.mark.slow), 16])
def test_images(ratio: int) -> None:
    model = with_plugin(VIT, compression_ratio=ratio)
    with torch.no_grad():
        batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
        program = torch.export.export(model.get_base_model(), (), VIT.inputs(2), dynamic_shapes=batch).module()
        inputs = VIT.inputs(3)
        expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(program(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_more_kept_tokens_than_there_is_room_for_are_an_error() -> None:
    program = exported(with_plugin(BERT, keep_token_ids=KEPT, max_kept_tokens=1).get_base_model()).module()
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        program(**crowded())


def test_using_ratio_around_an_export_is_an_error() -> None:
    model = with_plugin(BERT)
    with using_ratio(model, 2), pytest.raises(Exception, match="using_ratio"):
        exported(model.get_base_model())


@pytest.mark.slow
def test_onnx_runtime(tmp_path: Path) -> None:
    """Exact at lengths it has not seen, and an error where the rows do not suffice."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    model = with_plugin(BERT, keep_token_ids=KEPT, max_kept_tokens=2)
    inputs = text(2, 12)
    shapes = {name: {0: "batch", 1: "length"} for name in inputs}
    with torch.no_grad():
        torch.onnx.export(
            model.get_base_model(),
            (),
            tmp_path / "model.onnx",
            kwargs=inputs,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 5), (3, 33)):
        inputs = text(batch, length, seed=length)
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        with torch.no_grad():
            assert_same_at_real_tokens(torch.from_numpy(found), model(**inputs).last_hidden_state, inputs)
    with pytest.raises(Exception, match="(?i)invalid ind"):
        session.run(None, {name: value.numpy() for name, value in crowded().items()})
