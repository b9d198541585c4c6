"""A sequence gives the same result alone, padded on either side, or in any batch; padding costs nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from peft_variator import VariatorConfig, calibrate
from tests.tiny_models import BY_NAME, FIRST_WORD, LLAVA, TASK_HEADS, TEXT_CASES, VOCABULARY, Case, by_name

from .reference import watch, with_plugin


# Their base models classify the vector at position 0, whether or not that is padding.
WITHOUT_LEFT_PADDING = {"bert-sequence", "modernbert-sequence"}
CASES = [*TEXT_CASES, *(case for case in TASK_HEADS if case.kind != "vision")]
LENGTHS = (3, 12, 1, 7)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def batch_of(case: Case, texts: list[Tensor], side: str, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of texts padded to a length, and where the real tokens are."""
    pad = int(case.prototype.config.get_text_config().pad_token_id or 0)
    ids, mask = torch.full((len(texts), length), pad), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        start = {"left": length - len(text), "right": 0, "middle": (length - len(text)) // 2}[side]
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    parameters = inspect.signature(case.prototype.forward).parameters
    if "position_ids" in parameters and case.model_type not in ("roberta", "xlm-roberta", "mpnet"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if case.is_seq2seq:
        inputs["decoder_input_ids"] = torch.full((len(texts), 3), FIRST_WORD)
    return inputs, mask.bool()


def token_outputs(case: Case, model: torch.nn.Module, inputs: dict[str, Tensor], real: Tensor) -> list[Tensor]:
    """What the model gives for each text: its tokens' vectors, or the text's scores."""
    with torch.no_grad():
        output = model(**inputs)
    name = next(n for n in ("encoder_last_hidden_state", "last_hidden_state", "start_logits", "logits") if n in output)
    if output[name].shape[:2] != real.shape:
        return list(output[name])
    return [values[is_real] for values, is_real in zip(output[name], real, strict=True)]


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_alone_padded_or_in_a_batch(case: Case, ratio: int) -> None:
    model, texts = with_plugin(case, compression_ratio=ratio, keep_token_ids=[40, 50]), sequences()
    alone = [token_outputs(case, model, *batch_of(case, [text], "right", len(text)))[0] for text in texts]
    sides = ("right",) if case.name in WITHOUT_LEFT_PADDING else ("right", "left", "middle")
    for side in sides:
        padded = [token_outputs(case, model, *batch_of(case, [text], side, 15))[0] for text in texts]
        together = token_outputs(case, model, *batch_of(case, texts, side, 15))
        for one, own, shared in zip(alone, padded, together, strict=True):
            scale = max(1.0, float(one.abs().max()))
            torch.testing.assert_close(own, one, rtol=0, atol=1e-5 * scale, msg=lambda m, s=side: f"{s}: {m}")
            torch.testing.assert_close(shared, one, rtol=0, atol=1e-5 * scale, msg=lambda m, s=side: f"{s}: {m}")


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_padding_never_reaches_the_feed_forward_network(case: Case) -> None:
    model, texts = with_plugin(case, compression_ratio=4), sequences()
    for side in ("right", "left"):
        inputs, _ = batch_of(case, texts, side, 40)
        seen = watch(model, lambda inputs=inputs: model(**inputs))
        assert seen
        # SigLIP pools the last place of each row, be it padding or not.
        pooled = len(texts) if case.model_type == "siglip" and side == "right" else 0
        # 3 = 1 + 1 + 1; 12 = 1 + (4 + 4 + 2) + 1; 1 = 1; 7 = 1 + (4 + 1) + 1
        assert [network.rows for network in seen] == [3 + 5 + 1 + 4 + pooled] * len(seen)


PADDED = torch.tensor([[1] * 13, [1] * 9 + [0] * 4, [1] * 12 + [0]])


def pooled_by(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What SigLIP gives for each text as a whole."""
    with torch.no_grad():
        output = model(**inputs)
    return output["text_embeds"] if "text_embeds" in output else output["pooler_output"]


@pytest.mark.parametrize("name", ["siglip-text", "siglip"])
@pytest.mark.parametrize("fields", [{}, {"keep_last_tokens": 0}, {"keep_outliers": 0.2}, {"end": True}], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_pooled_output_may_be_read_at_padding(name: str, fields: dict[str, Any], attention: str) -> None:
    """With copies of all neurons nothing is lost, so that the last place alone can make a difference."""
    base, model = BY_NAME[name].build(), BY_NAME[name].build()
    for each in (base, model):
        each.set_attn_implementation(attention)
    inputs = BY_NAME[name].inputs(3, 13) | {"attention_mask": PADDED}
    expected = pooled_by(base, inputs)
    if "end" in fields:
        of_text = r"(?:text_model\.)?encoder\.layers\.\d+\.mlp\.fc1"
        fields = {"target_modules": of_text, "end_module": "fc2", "compress_vision_tower": False}
    plugin: Any = get_peft_model(model, VariatorConfig(correction_dim=1.0, **fields)).eval()
    if "keep_outliers" in fields:
        calibrate(plugin, [inputs])
    for ratio in (1, 2, 4, 16):
        plugin.set_compression_ratio(ratio)
        torch.testing.assert_close(pooled_by(plugin, inputs), expected, rtol=1e-4, atol=1e-5)


def ignores_padding(case: Case) -> bool:
    """Whether the base itself does not read the padding's ids, for positions or to find the last token."""
    return case.model_type not in ("roberta", "xlm-roberta", "mpnet") and case.name != "llama-sequence"


@pytest.mark.parametrize("case", list(filter(ignores_padding, CASES)), ids=by_name)
def test_content_of_the_padding_does_not_matter(case: Case) -> None:
    model, texts = with_plugin(case), sequences()
    inputs, real = batch_of(case, texts, "right", 15)
    before = token_outputs(case, model, inputs, real)
    other = inputs | {"input_ids": torch.where(real, inputs["input_ids"], 77)}
    for left, right in zip(before, token_outputs(case, model, other, real), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * max(1.0, float(left.abs().max())))


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_around_an_image_in_a_batch(side: str) -> None:
    model = with_plugin(LLAVA, compression_ratio=4)
    short, long = LLAVA.inputs(1, 5, seed=1), LLAVA.inputs(1, 9, seed=2)
    pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    amount = (pad, 0) if side == "left" else (0, pad)
    padded = {name: torch.nn.functional.pad(short[name], amount) for name in ("input_ids", "attention_mask")}
    inputs = {name: torch.cat([value, long[name]]) for name, value in padded.items()}
    inputs["pixel_values"] = torch.cat([short["pixel_values"], long["pixel_values"]])
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together, real = model(**inputs).logits, inputs["attention_mask"].bool()
        for row, alone in enumerate((short, long)):
            expected = model(**alone).logits[0]
            torch.testing.assert_close(together[row, real[row]], expected, rtol=0, atol=1e-4)
