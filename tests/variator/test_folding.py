"""What is exported has its low-rank updates summed into the weights, and the model that it was made from stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_variator import fold_updates, using_ratio
from peft_variator.tuners.variator.compensation import CompensatedLinear
from peft_variator.tuners.variator.linear_maps import UpdatedRows
from tests.tiny_models import BY_NAME, Case, by_name

from .reference import with_plugin


FORMS: list[dict[str, Any]] = [
    {"compensation_rank": 2, "decompression": "bottleneck"},
    {"compensation_rank": 2, "decompression": "neurons", "correction_dim": 8, "correction_rank": 3},
    {"compensation_rank": 2, "decompression": "neurons", "correction_dim": 8, "correction_form": "sliced"},
]


def states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """At real tokens."""
    with torch.no_grad():
        return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def text(case: Case, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    ids = case.inputs(batch, length, 0)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, (length + 1) // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()} & {CompensatedLinear, UpdatedRows}


@pytest.mark.parametrize("fields", FORMS, ids=str)
@pytest.mark.parametrize("case", [BY_NAME["bert"], BY_NAME["t5-encoder"]], ids=by_name)
def test_a_copy_gives_the_same_without_updates(case: Case, fields: dict[str, Any]) -> None:
    model, inputs = with_plugin(case, **fields), text(case)
    before, weights = states(model, inputs), {name: id(each) for name, each in model.named_parameters()}
    folded = fold_updates(model)
    torch.testing.assert_close(states(folded, inputs), before, rtol=1e-5, atol=1e-5)
    assert not kinds(folded)
    assert torch.equal(states(model, inputs), before)
    assert {name: id(each) for name, each in model.named_parameters()} == weights
    model.set_compression_ratio(1)
    with model.disable_adapter():
        base = states(model, inputs)
    # At k = 1 there is nothing to sum.
    assert torch.equal(states(fold_updates(model), inputs), base)
    assert torch.equal(states(model, inputs), base)


def test_layers_that_do_not_merge_keep_the_weights_of_the_base() -> None:
    case = BY_NAME["bert"]
    model = with_plugin(case, compensation_rank=2, ratio_pattern={"layer.0": 1})
    folded, inputs = fold_updates(model), text(case)
    left = [name for name, module in folded.named_modules() if isinstance(module, CompensatedLinear)]
    assert left
    assert all("layer.0." in name for name in left)
    torch.testing.assert_close(states(folded, inputs), states(model, inputs), rtol=1e-5, atol=1e-5)


def test_another_choice_on_a_copy_is_an_error() -> None:
    case = BY_NAME["bert"]
    model = with_plugin(case, compensation_rank=2)
    folded, inputs = fold_updates(model), text(case)
    with pytest.raises(RuntimeError, match="fold_updates"), folded.disable_adapter():
        folded(**inputs)
    with pytest.raises(RuntimeError, match="fold_updates"), using_ratio(folded, 2):
        folded(**inputs)
    folded.set_compression_ratio(1)
    with pytest.raises(RuntimeError, match="fold_updates"):
        folded(**inputs)
    with pytest.raises(ValueError, match="using_ratio"), using_ratio(model, 2):
        fold_updates(model)
    with pytest.raises(ValueError, match="plugin"):
        fold_updates(case.build())


def test_updates_stay_apart_where_a_sum_would_give_other_numbers() -> None:
    half = with_plugin(BY_NAME["bert"], compensation_rank=2).to(torch.bfloat16)
    assert kinds(fold_updates(half)) == {CompensatedLinear}
    causal = with_plugin(BY_NAME["llama"], compensation_rank=2)
    assert kinds(fold_updates(causal)) == {CompensatedLinear}


@pytest.mark.slow
def test_an_onnx_file_holds_each_map_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    case = replace(BY_NAME["bert"], config=BY_NAME["bert"].config | {"num_hidden_layers": 1})
    model, inputs = with_plugin(case, **FORMS[1]), text(case)
    shapes = {name: {0: "batch", 1: "length"} for name in inputs}
    with torch.no_grad():
        torch.onnx.export(
            fold_updates(model).get_base_model(),
            (),
            tmp_path / "model.onnx",
            kwargs=inputs,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    numbers = sum(int(torch.tensor(each.dims).prod()) for each in onnx.load(tmp_path / "model.onnx").graph.initializer)
    updates = sum(each.numel() for name, each in model.named_parameters() if "compensation" in name)
    base = sum(each.numel() for each in case.build().parameters())
    correction = sum(module.weight.numel() for module in model.modules() if isinstance(module, UpdatedRows))
    assert numbers < base + correction + updates
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = text(case, 3, 33)
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    real = torch.from_numpy(found)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(real, states(model, inputs), rtol=1e-4, atol=1e-4)
