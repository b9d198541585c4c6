"""A sequence gives the same result alone, padded on either side, or in any batch; padding costs nothing."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from tests.tiny_models import FIRST_WORD, LLAVA, TASK_HEADS, TEXT_CASES, VOCABULARY, Case, by_name

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
        # 3 = 1 + 1 + 1; 12 = 1 + (4 + 4 + 2) + 1; 1 = 1; 7 = 1 + (4 + 1) + 1
        assert [network.rows for network in seen] == [3 + 5 + 1 + 4] * len(seen)


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
