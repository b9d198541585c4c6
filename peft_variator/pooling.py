"""From hidden states to one vector for each input: an embedding, in training as in serving."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


__all__ = ["POOLINGS", "check_pooling", "pool"]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.sum(1) / mask.sum(1)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.sum(1) / mask.sum(1).sqrt()


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.cumsum(1) * mask
    return (hidden * weights).sum(1) / weights.sum(1)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask == 0, float("-inf")).amax(1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.squeeze(-1).argmax(1))


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return _at(hidden, mask.shape[1] - 1 - mask.squeeze(-1).flip(1).argmax(1))


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places]


# The names are those of sentence-transformers, and a second one.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _first,
    "first": _first,
    "max": _max,
    "lasttoken": _last,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
}


def check_pooling(pooling: str, name: str = "pooling") -> str:
    """Give back the name of a pooling.

    Raises:
        ValueError: there is none of this name; the message calls it by `name`.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"{name}={pooling!r} is not known; choose one of {', '.join(POOLINGS)}.")
    return pooling


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """One vector for each input, shape (batch, d); means over real tokens as in Reimers and Gurevych 2019
    (https://arxiv.org/abs/1908.10084, section 3).

    Sums are made in float32 or better: in half precision they are infinite for texts of a few hundred tokens.

    Args:
        hidden: hidden states, shape (batch, length, d). What stands at padding does not count, NaN neither.
        attention_mask: 0 or False for padding, anything else for real tokens, of which each input has one at least,
            shape (batch, length), on either side.
        pooling: a name in `POOLINGS`.
    """
    real = (attention_mask != 0).unsqueeze(-1)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return POOLINGS[pooling](hidden.to(wide).masked_fill(~real, 0), real.to(wide)).to(hidden.dtype)
