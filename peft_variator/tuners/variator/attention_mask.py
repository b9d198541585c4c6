"""What the masks and positions of a call say about its tokens: which are real, where texts start, who comes last.

Nothing here looks at values on the host, so that a call on a GPU is not held up and can be compiled; but for
`check_borders`, which is told whether it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


__all__ = [
    "CUMULATIVE_LENGTHS",
    "SEQUENCE_NUMBERS",
    "TokenOrder",
    "check_borders",
    "count_before",
    "last_tokens",
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
SEQUENCE_NUMBERS = "seq_idx"


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


def last_tokens(real: Tensor) -> Tensor:
    """The last real token of every sequence, on either side of the padding.

    Args:
        real: bool, shape `(batch, length)`.

    Returns:
        Tensor: bool, shape `(batch, length)`, at most one `True` a row.
    """
    return real & (real.flip(1).long().cumsum(1).flip(1) == 1)


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


def check_borders(arguments: Mapping[str, Any], shape: tuple[int, int], read_values: bool = True) -> None:
    """Raise if what tells the borders of a flattened batch can't be of this call.

    Args:
        arguments: of the call.
        shape: `(batch, length)`.
        read_values: whether values may be looked at on the host.

    Raises:
        ValueError: `cu_seq_lens_q` or `cu_seqlens` do not count tokens up from 0, or `seq_idx` is not one number a
            token.
    """
    tokens = shape[0] * shape[1]
    for name in (*CUMULATIVE_LENGTHS, SEQUENCE_NUMBERS):
        told = arguments.get(name)
        if told is None:
            continue
        if not isinstance(told, Tensor) or told.is_floating_point() or told.is_complex() or told.dtype == torch.bool:
            kind = f"a tensor of {told.dtype}" if isinstance(told, Tensor) else f"a {type(told).__name__}"
            raise ValueError(f"{name} is {kind}; where texts start is told by a tensor of int32 or int64.")
        if name == SEQUENCE_NUMBERS:
            if tuple(told.shape) not in (shape, (1, shape[1]), (shape[1],)):
                raise ValueError(
                    f"seq_idx has the shape {tuple(told.shape)}, but the call has {shape[0]} sequences of {shape[1]} "
                    f"tokens. Pass the number of each token's text, of shape {shape}."
                )
            continue
        problem = None
        if told.dim() != 1 or told.numel() == 0:
            problem = f"has the shape {tuple(told.shape)}"
        elif read_values:
            ends = told.tolist()
            decreasing = [(one, other) for one, other in pairwise(ends) if other < one]
            if ends[0] != 0:
                problem = f"starts with {ends[0]}"
            elif decreasing:
                problem = f"goes down from {decreasing[0][0]} to {decreasing[0][1]}"
            elif ends[-1] > tokens:
                problem = f"ends with {ends[-1]}, beyond the {tokens} tokens of the call"
        if problem is not None:
            raise ValueError(
                f"{name} {problem}. Pass the cumulative lengths of the texts as a 1-D tensor that starts with 0, "
                f"never goes down and ends with {tokens}, the number of tokens."
            )


def text_starts(
    arguments: Mapping[str, Any],
    mask: Tensor | None,
    real: Tensor | None,
    shape: tuple[int, int],
    past_length: int | Tensor,
    gaps: bool = False,
) -> Tensor | None:
    """Where the next one of several texts in a row starts, shape `(batch, length)`; `None` if nothing tells of any.

    Each real token is held against the real one before it, since there may be padding between two texts.

    Args:
        arguments: of the call. `cu_seq_lens_q` or `cu_seqlens` tell the borders of a batch that was flattened, and so
            do `seq_idx`, and `position_ids` of shape `(batch, length)` that do not go on.
        mask: the attention mask. A 4-D one starts a text where a token does not attend to the one before it.
        real: which tokens are no padding.
        shape: `(batch, length)`.
        past_length: number of cached tokens.
        gaps: whether positions that go on by more than 1 start a text too, as in transformers' causal models.
    """
    attends = None
    if mask is not None and mask.dim() == 4 and mask.shape[2] == shape[1]:
        attends = _attends(mask, shape[1], past_length).expand(shape[0], -1, -1)
    positions = None if attends is not None else _of_tokens(arguments.get("position_ids"), shape)
    of_texts = [_of_tokens(arguments.get(SEQUENCE_NUMBERS), shape)]
    of_texts += [_numbers_of_texts(arguments.get(name), shape) for name in CUMULATIVE_LENGTHS]
    numbers = [each for each in of_texts if each is not None]
    given = [each for each in (attends, positions, *numbers) if each is not None]
    if not given:
        return None
    before, has_before = _real_before(real, shape, given[0].device)
    told: list[Tensor] = []
    if attends is not None:
        told.append(~attends.gather(2, before.unsqueeze(2)).squeeze(2))
    if positions is not None:
        step = positions - positions.gather(1, before)
        told.append(step != 1 if gaps else step <= 0)
    for number in numbers:
        told.append(number != number.gather(1, before.to(number.device)))
    return reduce(torch.logical_or, [each.to(before.device) for each in told]) & has_before


def _numbers_of_texts(lengths: Any, shape: tuple[int, int]) -> Tensor | None:
    """The number of each token's text, shape `(batch, length)`, by the cumulative lengths of all texts of a batch."""
    if not isinstance(lengths, Tensor) or lengths.dim() != 1:
        return None
    tokens = shape[0] * shape[1]
    borders = torch.zeros(tokens + 1, dtype=torch.long, device=lengths.device).scatter(0, lengths.long(), 1)
    return borders[:tokens].cumsum(0).view(shape)


def _of_tokens(values: Any, shape: tuple[int, int]) -> Tensor | None:
    """Values of which each token has one, shape `(batch, length)`; `None` if they are of another shape."""
    if not isinstance(values, Tensor) or tuple(values.shape) not in (shape, (1, shape[1]), (shape[1],)):
        return None
    return values.expand(shape)


def _real_before(real: Tensor | None, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The place of the real token before each one (0 where there is none), and which real tokens have one.

    Both of shape `(batch, length)`.
    """
    places = torch.arange(shape[1], device=device).expand(shape)
    if real is None:
        return (places - 1).clamp(min=0), places > 0
    present = real.long()
    number = present.cumsum(1)
    place_of = number.new_zeros(shape[0], shape[1] + 1).scatter_add(1, number * present, places * present)
    before = number - present
    return place_of.gather(1, before), real & (before > 0)


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
    """The columns behind the cached tokens, as far as there are any: some masks are as long as a static cache."""
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
