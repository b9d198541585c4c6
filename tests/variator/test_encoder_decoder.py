"""Encoder–decoder models: the encoder's networks merge, the decoder's never do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BY_NAME, FIRST_WORD, SEQ2SEQ, Case, by_name

from .reference import watch


def with_plugin(case: Case, task_type: str | None = None) -> torch.nn.Module:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, task_type=task_type)).eval()


@pytest.mark.parametrize("case", SEQ2SEQ, ids=by_name)
def test_only_the_encoder_has_plugins(case: Case) -> None:
    names = [name for name, module in with_plugin(case).named_modules() if isinstance(module, VariatorLayer)]
    assert len(names) == 2
    assert all(".encoder." in name for name in names)


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("case", SEQ2SEQ, ids=by_name)
def test_labels_belong_to_the_decoder(case: Case, task_type: str | None) -> None:
    """Labels keep nothing of the encoder from being merged, even where they are as long as its input."""
    model, inputs = with_plugin(case, task_type), case.inputs(2, 14)
    inputs = {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}
    assert [seen.rows for seen in watch(model, lambda: model(**inputs))] == [2 * (1 + 3 + 1)] * 2


@pytest.mark.parametrize("case", SEQ2SEQ, ids=by_name)
def test_the_decoder_is_the_base_model_on_the_merged_encoding(case: Case) -> None:
    model, inputs = with_plugin(case), case.inputs(2, 14)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 9:] = 0
    with torch.no_grad():
        merged = model(**inputs)
        decoder_inputs = {name: inputs[name] for name in ("decoder_input_ids", "attention_mask")}
        encoding = BaseModelOutput(merged.encoder_last_hidden_state)
        expected = case.build()(encoder_outputs=encoding, **decoder_inputs).logits
    torch.testing.assert_close(merged.logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", SEQ2SEQ, ids=by_name)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(case: Case, beams: int) -> None:
    model = with_plugin(case, "SEQ_2_SEQ_LM")
    ids = case.inputs(2, 14)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    together = model.generate(input_ids=padded, attention_mask=mask, **options)
    for row, length in enumerate((9, 14)):
        alone = model.generate(input_ids=ids[row : row + 1, :length], **options)
        assert together[row].tolist() == alone[0].tolist()
    with model.disable_adapter():
        exact = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert exact.tolist() == case.build().generate(input_ids=padded, attention_mask=mask, **options).tolist()


@pytest.mark.parametrize("case", SEQ2SEQ, ids=by_name)
def test_a_ready_encoding_passes_by_the_plugins(case: Case) -> None:
    model, inputs = with_plugin(case), case.inputs(2, 14)
    with torch.no_grad():
        encoding = model(**inputs).encoder_last_hidden_state
        arguments = {"encoder_outputs": BaseModelOutput(encoding), "decoder_input_ids": torch.full((2, 3), FIRST_WORD)}
        assert watch(model, lambda: model(**arguments)) == []


@pytest.mark.parametrize("case", SEQ2SEQ, ids=by_name)
def test_assisted_decoding(case: Case) -> None:
    model, ids = with_plugin(case), case.inputs(1, 14)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False}
    helped = model.generate(input_ids=ids, **options, assistant_model=case.build())
    assert helped.tolist() == model.generate(input_ids=ids, **options).tolist()


@pytest.mark.parametrize("encoder", ["bert", "vit"])
@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_models_put_together_from_two(encoder: str, decoder: str) -> None:
    """The decoder's own row of the table does not count where it attends to an encoder."""
    parts = {case.name: case.prototype.config for case in ALL if case.name in ("bert", "vit", "gpt2")}
    joint = EncoderDecoderConfig if encoder == "bert" else VisionEncoderDecoderConfig
    builder = EncoderDecoderModel if encoder == "bert" else VisionEncoderDecoderModel
    base = builder(joint.from_encoder_decoder_configs(*map(copy.deepcopy, (parts[encoder], parts[decoder]))))
    base.config.decoder_start_token_id, base.config.pad_token_id = 1, 0
    model = get_peft_model(base, VariatorConfig())
    assert model.targeted_module_names
    assert all(name.startswith("encoder.") for name in model.targeted_module_names)
    case = next(case for case in ALL if case.name == encoder)
    inputs = case.inputs(2, 14) | {"labels": torch.randint(FIRST_WORD, 99, (2, 14))}
    rows = 2 * (5 if encoder == "bert" else 10)
    assert [seen.rows for seen in watch(model, lambda: model(**inputs))] == [rows] * 2


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t5", {"target_modules": r"decoder\.block\.\d+\.layer\.2\.DenseReluDense"}),
        ("bart", {"target_modules": r".*decoder\.layers\.\d+\.fc1", "end_module": "fc2"}),
    ],
)
def test_predictions_of_a_decoder_that_have_a_label_see_no_later_token(name: str, fields: dict[str, str]) -> None:
    """A plugin can be put into a decoder by naming its networks; position t predicts label t there."""
    torch.manual_seed(1)
    case = BY_NAME[name]
    config = VariatorConfig(init_weights=False, keep_first_tokens=0, keep_last_tokens=0, **fields)
    model = get_peft_model(case.build(), config).eval()
    inputs = {"input_ids": case.inputs(2, 9)["input_ids"], "decoder_input_ids": case.inputs(2, 14, 1)["input_ids"]}
    inputs["labels"] = torch.full((2, 14), -100)
    inputs["labels"][:, [3, 9]] = FIRST_WORD
    other = inputs["decoder_input_ids"].clone()
    with torch.no_grad():
        logits = model(**inputs).logits
        for at in (3, 9):
            other[:, at + 1 :] = FIRST_WORD + 1
            changed = model(**inputs | {"decoder_input_ids": other}).logits
            torch.testing.assert_close(changed[:, at], logits[:, at], rtol=0, atol=1e-5)
            other = inputs["decoder_input_ids"].clone()
