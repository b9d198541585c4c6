"""Several texts in one row: a border is a border however it is told, and each text gets what it gets alone."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import BERT, CAUSAL, LLAMA, Case, by_name

from .reference import with_plugin


LENGTHS = (7, 1, 9, 4, 12)
LOWEST = torch.finfo(torch.float32).min
# Learned positions are looked up where they are told to; these take texts apart from position ids alone.
ROTARY = [case for case in CAUSAL if case.name in ("llama", "qwen2", "mistral", "gemma", "qwen3")]


def texts_of(case: Case, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [case.inputs(1, length, seed)["input_ids"] for seed, length in enumerate(lengths)]


def positions_of(texts: list[Tensor]) -> Tensor:
    return torch.cat([torch.arange(text.shape[1]) for text in texts]).unsqueeze(0)


def cumulative(texts: list[Tensor]) -> Tensor:
    return torch.tensor([0, *accumulate(text.shape[1] for text in texts)], dtype=torch.int32)


def last_hidden(model: PeftModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[-1]


KEPT = [{}, {"keep_first_tokens": 2, "keep_last_tokens": 3}, {"keep_first_tokens": 0, "keep_last_tokens": 0}]


@pytest.mark.parametrize("fields", KEPT, ids=str)
@pytest.mark.parametrize("by", ["positions", "both"])
@pytest.mark.parametrize("case", ROTARY, ids=by_name)
def test_a_flattened_batch_gives_what_each_text_gives_alone(case: Case, by: str, fields: dict[str, int]) -> None:
    model, texts = with_plugin(case, **fields), texts_of(case)
    extra = {"cu_seq_lens_q": cumulative(texts), "cu_seq_lens_k": cumulative(texts)} if by == "both" else {}
    flat = last_hidden(
        model, input_ids=torch.cat(texts, 1), position_ids=positions_of(texts), use_cache=False, **extra
    )
    for text, own in zip(texts, flat.split([text.shape[1] for text in texts], dim=1), strict=True):
        torch.testing.assert_close(own, last_hidden(model, input_ids=text, use_cache=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fields", KEPT, ids=str)
def test_labels_in_a_flattened_batch(fields: dict[str, int]) -> None:
    model, texts = with_plugin(LLAMA, **fields), texts_of(LLAMA)
    labels = [torch.where(torch.arange(text.shape[1]) < text.shape[1] // 2, -100, text) for text in texts]
    for label in labels:
        label[:, 0] = -100  # as DataCollatorWithFlattening does
    arguments = {"input_ids": torch.cat(texts, 1), "position_ids": positions_of(texts), "use_cache": False}
    flat = last_hidden(model, **arguments, labels=torch.cat(labels, 1))
    rows = flat.split([text.shape[1] for text in texts], dim=1)
    for text, label, own in zip(texts, labels, rows, strict=True):
        if text.shape[1] > 1:
            alone = last_hidden(model, input_ids=text, labels=label, use_cache=False)
            torch.testing.assert_close(own, alone, rtol=0, atol=1e-5)


def test_an_encoder_that_keeps_texts_apart_by_its_mask_and_their_lengths() -> None:
    model, texts = with_plugin(BERT), texts_of(BERT)
    text_of = torch.cat([torch.full((text.shape[1],), index) for index, text in enumerate(texts)])
    apart = torch.zeros(1, 1, text_of.numel(), text_of.numel())
    apart = apart.masked_fill(text_of.unsqueeze(0) != text_of.unsqueeze(1), LOWEST)
    told = {"position_ids": positions_of(texts), "attention_mask": apart, "cu_seq_lens_q": cumulative(texts)}
    flat = last_hidden(model, input_ids=torch.cat(texts, 1), **told)
    for text, own in zip(texts, flat.split([text.shape[1] for text in texts], dim=1), strict=True):
        torch.testing.assert_close(own, last_hidden(model, input_ids=text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens", "seq_idx"])
def test_lengths_alone_end_groups_in_an_encoder(name: str) -> None:
    """The base attends across the texts here, as it does without FlashAttention; groups end all the same."""
    model, texts = with_plugin(BERT), texts_of(BERT, (6, 6))
    layer, rows = next(module for module in model.modules() if isinstance(module, VariatorLayer)), []
    layer.base_layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    model(input_ids=torch.cat(texts, 1))
    told = torch.tensor([[0] * 6 + [1] * 6]) if name == "seq_idx" else cumulative(texts)
    model(input_ids=torch.cat(texts, 1), **{name: told})
    assert rows == [1 + 3 + 1, 2 * (1 + 1 + 1)]


@pytest.mark.parametrize("fields", [{}, {"compensation_rank": 2}], ids=str)
def test_positions_that_jump_ahead_are_borders(fields: dict[str, int]) -> None:
    """As in transformers' causal models; a text of one token has the plugin's updates, too."""
    model, texts = with_plugin(LLAMA, **fields), texts_of(LLAMA)
    lengths = [text.shape[1] for text in texts]
    ends = list(accumulate(length + 2 for length in lengths))
    positions = torch.cat([torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)])
    flat = last_hidden(model, input_ids=torch.cat(texts, 1), use_cache=False, position_ids=positions.unsqueeze(0))
    for text, own in zip(texts, flat.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(own, last_hidden(model, input_ids=text, use_cache=False), rtol=0, atol=1e-5)


def test_padding_between_texts_hides_no_border() -> None:
    model, texts = with_plugin(BERT, keep_first_tokens=0, keep_last_tokens=0), texts_of(BERT, (5, 6))
    ids = torch.cat([texts[0], torch.zeros(1, 3, dtype=torch.long), texts[1]], 1)
    text_of = torch.tensor([1] * 5 + [0] * 3 + [2] * 6)
    shown = (text_of.unsqueeze(0) == text_of.unsqueeze(1)) & (text_of != 0)
    hidden = torch.zeros(1, 1, 14, 14).masked_fill(~shown, LOWEST)
    positions = torch.tensor([[*range(5), 0, 0, 0, *range(6)]])
    found = last_hidden(model, input_ids=ids, position_ids=positions, attention_mask=hidden)
    torch.testing.assert_close(found[:, :5], last_hidden(model, input_ids=texts[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 8:], last_hidden(model, input_ids=texts[1]), rtol=0, atol=1e-5)


MALFORMED = {
    "starts with 3": torch.tensor([3, 12]),
    "goes down from 8 to 5": torch.tensor([0, 8, 5, 12]),
    "ends with 13": torch.tensor([0, 13]),
    "torch.float32": torch.tensor([0.0, 12.0]),
    r"shape \(1, 2\)": torch.tensor([[0, 12]]),
    "list": [0, 12],
}


@pytest.mark.parametrize("problem", MALFORMED)
@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens"])
def test_lengths_that_count_no_tokens_are_refused(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*{problem}"):
        with_plugin(BERT)(input_ids=BERT.inputs(1, 12)["input_ids"], **{name: MALFORMED[problem]})


def test_positions_that_go_on_behind_a_cache_are_no_border() -> None:
    model, ids = with_plugin(LLAMA), LLAMA.inputs(1, 24)["input_ids"]
    layer, rows = next(module for module in model.modules() if isinstance(module, VariatorLayer)), []
    layer.base_layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :11], use_cache=True).past_key_values
        model(input_ids=ids[:, 11:], past_key_values=cache, position_ids=torch.arange(11, 24).unsqueeze(0))
    assert rows == [1 + 3 + 1, 3 + 1]


def test_three_rows_of_positions_are_no_borders() -> None:
    """Qwen-VL's positions count time, height and width, and start again at every row of an image."""
    from peft_variator.tuners.variator.attention_mask import text_starts

    positions = torch.tensor([0, 1, 2, 2, 3, 3]).expand(3, 2, 6)
    assert text_starts({"position_ids": positions}, None, None, (2, 6), 0) is None


# Masks with other values


@pytest.mark.parametrize("mask_of", [lambda mask: mask * 2, lambda mask: mask * 0.5, lambda mask: mask * -1.0])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_every_value_but_zero_is_a_real_token(case: Case, mask_of: Any) -> None:
    model, ids = with_plugin(case), case.inputs(3, 12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[1, :4] = 0, 0
    with torch.no_grad():
        expected = next(iter(model(input_ids=ids, attention_mask=mask).values()))
        found = next(iter(model(input_ids=ids, attention_mask=mask_of(mask)).values()))
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("shape", [(3, 11), (2, 12)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    model, ids = with_plugin(BERT), BERT.inputs(3, 12)["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask has the shape"):
        model(input_ids=ids, attention_mask=torch.ones(shape, dtype=torch.long))


# Half precision


def test_scores_beyond_the_range_of_half_precision() -> None:
    from peft_variator.tuners.variator.merging import Block
    from peft_variator.tuners.variator.scoring import SCORINGS

    tokens = torch.tensor([[[300.0, 1.0], [299.0, 2.0], [-300.0, 3.0], [0.0, 4.0]]])
    for name in SCORINGS:
        scorer = SCORINGS[name].create(2, 4)
        torch.nn.init.zeros_(scorer.weight)
        with torch.no_grad():
            scorer.weight[:, ::2] = 300.0
        scores = SCORINGS[name].score(scorer.half(), tokens.half())(Block(0, (1, 4)))
        expected = SCORINGS[name].score(scorer.float(), tokens)(Block(0, (1, 4)))
        assert torch.isfinite(scores).all()
        torch.testing.assert_close(scores.float(), expected)
