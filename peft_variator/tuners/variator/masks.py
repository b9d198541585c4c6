"""What an attention mask tells of a call's tokens, as pure functions: which are real, and where texts start.

A mask has shape `(batch, cached + length)`, or `(batch, heads, queries, keys)` and is True (or, where it
is added to the scores, not very low) where attention is allowed. `shape` is the `(batch, length)` of the tokens of the
call, and `past_length` the number of cached tokens before them, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


__all__ = ["last_tokens", "places", "real_tokens", "single_mask", "text_starts", "with_those_before"]

# What is added to a score to block it is -inf, the least number of the dtype, or by an older convention -10,000.
# Biases by position, which callers may add to the same mask, are far above.
BLOCKED = -9000.0


def single_mask(mask: Any) -> Tensor | None:
    """The mask that tells most, of those a model was called with.

    Args:
        mask: a mask, or one for each kind of attention, or `None`.

    Raises:
        ValueError: it is of a kind that cannot be read.
    """
    if isinstance(mask, Mapping):
        # The one without a window shows most of the cache. Where one of them may be left out, no token is padding.
        masks = list(mask.values())
        mask = None if any(each is None for each in masks) else max(masks, key=lambda each: each.shape[-1])
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() not in (2, 4)):
        raise ValueError(
            f"A Variator plugin cannot read an attention mask of type {type(mask).__name__}"
            f"{f' and shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else ''}. Pass a 2-D mask of shape "
            "(batch, length), or a 4-D one."
        )
    return mask


def real_tokens(mask: Tensor | None, shape: tuple[int, int], past_length: int) -> Tensor | None:
    """Which tokens are no padding, shape `(batch, length)`; `None` where all are real."""
    if mask is None:
        return None
    if mask.dim() == 2:
        real = mask[:, -shape[1] :].bool()
    else:
        own = _attends(mask, shape[1], past_length)
        real = own[:, 0] if own.shape[1] == 1 else own.diagonal(dim1=1, dim2=2)
    return None if bool(real.all()) else real.expand(shape)


def text_starts(
    mask: Tensor | None, positions: Any, real: Tensor | None, shape: tuple[int, int], past_length: int
) -> Tensor | None:
    """Where the next one of several texts packed into a sequence starts, shape `(batch, length)`; `None` if nowhere.

    Args:
        mask: the attention mask. A 4-D one starts a text where a token does not attend to the one before it.
        positions: position ids of a causal model, which start anew with each text; `None` for other models.
        real: which tokens are no padding.
        shape: `(batch, length)`.
        past_length: number of cached tokens.
    """
    if mask is not None and mask.dim() == 4 and mask.shape[2] == shape[1]:
        attends = _attends(mask, shape[1], past_length).diagonal(offset=-1, dim1=1, dim2=2)
        starts = pad(~attends, (1, 0)).expand(shape)
        starts = starts if real is None else starts & real & real.roll(1, 1)
    elif real is None and isinstance(positions, Tensor) and positions.dim() == 2:
        starts = pad(positions[:, 1:] <= positions[:, :-1], (1, 0)).expand(shape)
    else:
        return None
    return starts if bool(starts.any()) else None


def places(
    mask: Tensor | None, real: Tensor | None, shape: tuple[int, int], past_length: int, device: torch.device
) -> Tensor:
    """The place of each token among the real ones of its sequence, cached ones counted in; shape `(batch, length)`.

    Position ids do not tell it: they may count padding too, or start anywhere.
    """
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(1) - 1)[:, -shape[1] :].expand(shape)
    if mask is not None and past_length and mask.shape[2] == shape[1]:
        return (_is_allowed(mask).sum(-1) - 1).expand(shape)  # causal, as it has a cache
    own = torch.arange(shape[1], device=device).expand(shape) if real is None else real.long().cumsum(1) - 1
    return own + past_length


def last_tokens(real: Tensor | None, count: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """The last `count` real tokens of each sequence, shape `(batch, length)`."""
    if real is None:
        return (torch.arange(shape[1], device=device) >= shape[1] - count).expand(shape)
    return real & (real.flip(1).long().cumsum(1).flip(1) <= count)


def with_those_before(chosen: Tensor, real: Tensor | None, count: int) -> Tensor:
    """The chosen tokens, each with the `count - 1` real ones before it; shape `(batch, length)`."""
    if count <= 1:
        return chosen
    rank = torch.ones_like(chosen).cumsum(1) if real is None else real.long().cumsum(1)
    beyond = rank.new_full((), chosen.shape[1] + count)
    next_chosen = torch.where(chosen, rank, beyond).flip(1).cummin(1).values.flip(1)
    return next_chosen - rank < count


def _attends(mask: Tensor, length: int, past_length: int) -> Tensor:
    """Which tokens of this call attend to which, from a 4-D mask; shape `(batch, length or 1, length)`."""
    first = min(past_length, mask.shape[-1] - length)  # a cache with a window holds less than it has seen
    return _is_allowed(mask)[..., first : first + length]


def _is_allowed(mask: Tensor) -> Tensor:
    """Where a 4-D mask allows attention, shape `(batch, queries, keys)`."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > BLOCKED
