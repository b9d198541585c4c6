"""Which tokens of a text share a row, from what a call tells and the rule of a module."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from .facts import CallFacts
from .group import group_runs, pack, share_blocks
from .grouping import Grouping
from .masks import last_tokens, places, real_tokens, single_mask, text_starts, with_those_before
from .predictions import used_predictions
from .rule import MergeRule


__all__ = ["group_text"]


def group_text(facts: CallFacts, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Grouping:
    """The grouping of the tokens of a text: shared by all sequences where they look alike, else packed.

    Args:
        facts: what the call tells.
        rule: what the module merges.
        shape: `(batch, length)`.
        device: that of the call's masks.

    Raises:
        ValueError: a mask cannot be read, or text cannot be told from images.
    """
    mask = single_mask(facts.arguments.get("attention_mask"))
    real = real_tokens(mask, shape, facts.past_length)
    positions = facts.arguments.get("position_ids") if facts.kind == "causal" else None
    starts = text_starts(mask, positions, real, shape, facts.past_length)
    place = places(mask, real, shape, facts.past_length, device)
    if starts is not None:
        place = place - torch.where(starts, place, 0).cummax(1).values
    may_merge = _may_merge(facts, rule, real, place >= rule.keep_first, shape, device)
    breaks = _breaks(facts, rule, starts, shape)
    if real is None and breaks is None and shape[0] and bool((may_merge == may_merge[:1]).all()):
        runs = [(len(list(run)), flag) for flag, run in groupby(may_merge[0].tolist())]
        grouping = share_blocks(runs, rule.ratio, shape[0], device)
        if grouping is not None:
            return grouping
    starts_run = ~may_merge if breaks is None else breaks | ~may_merge
    return _pack(rule, starts_run, may_merge, real)


def _pack(rule: MergeRule, breaks: Tensor, may_merge: Tensor, real: Tensor | None) -> Grouping:
    batch, length = may_merge.shape
    flat_merge, flat_breaks = may_merge.flatten(), breaks.flatten()
    token_of = (
        torch.arange(batch * length, device=breaks.device) if real is None else real.flatten().nonzero().squeeze(1)
    )
    may, row = flat_merge[token_of], token_of // length
    starts_run = flat_breaks[token_of]
    # What follows a token that is not merged, or lies in another sequence, starts anew.
    starts_run[1:] |= ~may[:-1] | (row[1:] != row[:-1])
    starts_run[:1] = True
    slots = min(rule.ratio, length)
    return pack(group_runs(starts_run, may, slots), token_of, slots, batch * length)


def _may_merge(
    facts: CallFacts,
    rule: MergeRule,
    real: Tensor | None,
    is_later: Tensor,
    shape: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Which tokens may share a row, shape `(batch, length)`. `is_later`: those behind `keep_first_tokens`."""
    may_merge = is_later & ~last_tokens(real, rule.keep_last, shape, device)
    ids = facts.token_ids(shape)
    if rule.keep_ids and ids is not None:
        may_merge &= ~torch.isin(ids, torch.tensor(rule.keep_ids, device=ids.device))
    if facts.image_ids and not (rule.text and rule.images):
        is_image = _is_image(facts, shape)
        if not rule.text:
            may_merge &= is_image
        if not rule.images:
            may_merge &= ~is_image
    elif not rule.text:
        may_merge &= False
    if facts.kind == "causal":
        # The last token of a prompt is the first whose prediction is used: `keep_last_tokens` count from there.
        may_merge &= ~with_those_before(used_predictions(facts, real, shape, device), real, rule.keep_last)
    return may_merge if real is None else may_merge & real


def _breaks(facts: CallFacts, rule: MergeRule, starts: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Tokens that start a packed text or a stretch of text or image; `None` where there are none."""
    breaks = starts
    if facts.image_ids and rule.text and rule.images:
        is_image = _is_image(facts, shape, must_differ=False)
        edges = pad(is_image[:, 1:] != is_image[:, :-1], (1, 0))
        breaks = edges if breaks is None else breaks | edges
    return breaks if breaks is not None and bool(breaks.any()) else None


def _is_image(facts: CallFacts, shape: tuple[int, int], must_differ: bool = True) -> Tensor:
    """Which tokens belong to an image, shape `(batch, length)`."""
    ids = facts.token_ids(shape)
    if ids is not None:
        return torch.isin(ids, torch.tensor(facts.image_ids, device=ids.device))
    is_image = facts.image_tokens
    if is_image is None or tuple(is_image.shape) != shape or (must_differ and not bool(is_image.any())):
        raise ValueError(
            "A Variator plugin cannot tell text from image tokens: the call has no input_ids, and its "
            "inputs_embeds have no placeholders of an image. Pass input_ids, or set compress_text_tokens and "
            "compress_image_tokens to False."
        )
    return is_image
