"""What the masks and positions of a call say about its tokens: which are real, where texts start, who comes last.

Nothing here looks at a tensor's values on the host, so that a call on a GPU is not held up and can be compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


__all__ = [
    "CUMULATIVE_LENGTHS",
    "TokenOrder",
    "count_before",
    "real_tokens",
    "shifted",
    "single_mask",
    "text_starts",
    "token_ranks",
    "with_those_before",
]

# What is added to a score to block it is -inf, the least number of the dtype, or by an older convention -10,000.
# Biases by position, which callers may add to the same mask, are far above.
BLOCKED = -9000.0
# Who hands several texts over as one row tells where they start, as transformers and the kernels behind it call it.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens")


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


def real_tokens(mask: Tensor | None, shape: tuple[int, int], past_length: int | Tensor) -> Tensor | None:
    """Which tokens are no padding, shape `(batch, length)`; `None` where no mask says that any is.

    In a 2-D mask every value but 0 stands for a real token, as in the models.

    Raises:
        ValueError: the mask belongs to another batch, or to fewer tokens.
    """
    if mask is None:
        return None
    batch, length = shape
    if mask.shape[0] not in (1, batch) or mask.shape[-1] < length:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}, but the call has {batch} sequences of {length} "
            f"tokens. Pass a mask of shape ({batch}, {length}), cached tokens before them counted in."
        )
    if mask.dim() == 2:
        return (_of_this_call(mask, length, past_length) != 0).expand(shape)
    own = _attends(mask, length, past_length)
    return (own[:, 0] if own.shape[1] == 1 else own.diagonal(dim1=1, dim2=2)).expand(shape)


def text_starts(
    arguments: Mapping[str, Any],
    mask: Tensor | None,
    real: Tensor | None,
    shape: tuple[int, int],
    past_length: int | Tensor,
) -> Tensor | None:
    """Where the next one of several texts in a row starts, shape `(batch, length)`; `None` if nothing tells of any.

    Args:
        arguments: of the call. `cu_seq_lens_q` tells the borders of a row that holds several texts, and so do
            `position_ids` of shape `(batch, length)` that do not go on.
        mask: the attention mask. A 4-D one starts a text where a token does not attend to the one before it.
        real: which tokens are no padding.
        shape: `(batch, length)`.
        past_length: number of cached tokens.
    """
    both_real = None if real is None else real & real.roll(1, 1)
    found: Tensor | None = None
    if mask is not None and mask.dim() == 4 and mask.shape[2] == shape[1]:
        attends = _attends(mask, shape[1], past_length).diagonal(offset=-1, dim1=1, dim2=2)
        found = pad(~attends, (1, 0)).expand(shape)
    else:
        positions = arguments.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == shape[1]:
            if positions.shape[0] in (1, shape[0]):
                restarts = positions <= shifted(positions, 0)
                found = (restarts & (torch.arange(shape[1], device=positions.device) > 0)).expand(shape)
    for name in CUMULATIVE_LENGTHS:
        lengths = arguments.get(name)
        if isinstance(lengths, Tensor) and lengths.dim() == 1 and shape[0] == 1:
            borders = torch.zeros(shape[1] + 1, dtype=torch.bool, device=lengths.device)
            borders = borders.scatter(0, lengths.long(), True)[: shape[1]].unsqueeze(0)
            found = borders if found is None else found | borders
    return found if found is None or both_real is None else found & both_real


def token_ranks(
    mask: Tensor | None, real: Tensor | None, shape: tuple[int, int], past_length: int | Tensor, device: torch.device
) -> Tensor:
    """The place of each token among the real ones of its sequence, cached ones counted in; shape `(batch, length)`.

    Position ids do not tell it: they may count padding too, or start anywhere.
    """
    if mask is not None and mask.dim() == 2:
        return _of_this_call((mask != 0).long().cumsum(1) - 1, shape[1], past_length).expand(shape)
    if mask is not None and mask.shape[-1] > shape[1] and mask.shape[2] == shape[1]:
        return (_is_allowed(mask).long().sum(-1) - 1).expand(shape)  # causal, as it has a cache
    own = torch.arange(shape[1], device=device).expand(shape) if real is None else real.long().cumsum(1) - 1
    return own + past_length


class TokenOrder:
    """How far each real token is from the start and from the end of its text.

    Args:
        real: which tokens are no padding, shape `(batch, length)`; `None`: all.
        starts: where texts start behind the first of a row, shape `(batch, length)`; `None`: nowhere.
        ranks: see [`token_ranks`].
    """

    def __init__(self, real: Tensor | None, starts: Tensor | None, ranks: Tensor) -> None:
        present = torch.ones_like(ranks) if real is None else real.long()
        self.real = real
        self.number = present.cumsum(1)
        """Counted from 1 among the real tokens of the call's row, shape `(batch, length)`."""
        self.last_number = self.number[:, -1:].expand_as(self.number)
        """The number of the last real token of each token's text, shape `(batch, length)`."""
        self.from_start = ranks
        """Number of real tokens before each one in its text, cached ones counted in; shape `(batch, length)`."""
        if starts is not None:
            text = starts.long().cumsum(1)
            before, inside = count_before(text, present, ranks.shape[1] + 1)
            self.from_start = torch.where(text == 0, ranks, self.number - 1 - before)
            self.last_number = before + inside

    def last(self, count: int) -> Tensor:
        """The last `count` real tokens of each text, shape `(batch, length)`."""
        is_last = self.last_number - self.number < count
        return is_last if self.real is None else is_last & self.real


def count_before(segment: Tensor, present: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """How many tokens lie in the segments before each token's own, and how many in its own.

    Args:
        segment: number of each token's segment, which never gets smaller in a row; shape `(batch, length)`.
        present: 1 for tokens that count, else 0; shape `(batch, length)`.
        segments: more than the largest number.

    Returns:
        Both of shape `(batch, length)`.
    """
    # Sums and gathers alone: what finds the last start before a token (`cummax`) has no counterpart in ONNX.
    sizes = present.new_zeros(present.shape[0], segments).scatter_add(1, segment, present)
    return (sizes.cumsum(1) - sizes).gather(1, segment), sizes.gather(1, segment)


def with_those_before(chosen: Tensor, order: TokenOrder, count: int) -> Tensor:
    """The chosen tokens, each with the `count - 1` real ones before it in its text; shape `(batch, length)`."""
    if count <= 1:
        return chosen
    counted = chosen.long() if order.real is None else (chosen & order.real).long()
    # How many are chosen among the real tokens up to a number.
    up_to = counted.new_zeros(chosen.shape[0], chosen.shape[1] + 1).scatter_add(1, order.number, counted).cumsum(1)
    reach = torch.minimum(order.number + count - 1, order.last_number)
    return up_to.gather(1, reach) > up_to.gather(1, (order.number - 1).clamp(min=0))


def shifted(values: Tensor, first: float) -> Tensor:
    """Each value one place later, shape `(batch, length)`; without a slice whose length a compiler would look at.

    Args:
        values: shape `(batch, length)`.
        first: what stands in the first place.
    """
    is_first = torch.arange(values.shape[1], device=values.device) == 0
    return values.roll(1, 1).masked_fill(is_first, first)


def _of_this_call(values: Tensor, length: int, past_length: int | Tensor) -> Tensor:
    """The columns behind the cached tokens, as far as there are any: some masks are as long as a static cache.

    Args:
        values: shape `(batch, columns)`.
        length: number of tokens of the call.
        past_length: number of cached tokens.
    """
    last_start = values.shape[1] - length
    if isinstance(past_length, Tensor):
        first = past_length.clamp(max=last_start)
        return values.index_select(1, first + torch.arange(length, device=values.device))
    start = min(past_length, last_start)
    return values[:, start : start + length]


def _attends(mask: Tensor, length: int, past_length: int | Tensor) -> Tensor:
    """Which tokens of this call attend to which, from a 4-D mask; shape `(batch, length or 1, length)`."""
    allowed = _is_allowed(mask)
    if allowed.shape[-1] == length:
        return allowed
    first = min(int(past_length), mask.shape[-1] - length)  # a cache with a window holds less than it has seen
    return allowed[..., first : first + length]


def _is_allowed(mask: Tensor) -> Tensor:
    """Where a 4-D mask allows attention, shape `(batch, queries, keys)`."""
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > BLOCKED
