"""Tokens that a feed-forward network answers with unusually long vectors, found before it runs and never merged.

A few tokens of a text, often full stops and the like, hold most of the variance of a network's output. The logarithm
of the output's norm is nearly linear in the network's input, so one vector, fitted by [`calibrate`], tells them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor, nn

from .attention_mask import count_before


__all__ = ["LeastSquares", "OutlierProbe", "Share", "choose_outliers", "count_outliers", "share_of"]

Count = TypeVar("Count", int, Tensor)
Share = tuple[int, int]
"""A share of a text's tokens as `(numerator, denominator)`."""

RIDGE = 1e-4
"""Of the mean variance of the inputs; normalised vectors have a direction in which they do not vary."""


def share_of(share: float) -> Share:
    """A share as the fraction that was meant: 0.1 is a tenth, not the binary number nearest to it."""
    fraction = Fraction(share).limit_denominator(1_000_000)
    if fraction in (0, 1):  # what so small a denominator cannot tell from none or all
        fraction = Fraction(share)
    return fraction.numerator, fraction.denominator


class OutlierProbe(nn.Module):
    """A linear probe of the logarithm of a network's output norm, w·x; what it is for all tokens alike does not count.

    Args:
        dim: d, width of the hidden states.
    """

    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        # No parameter: nothing that is trained depends on it in a way that has a gradient.
        self.register_buffer("weight", torch.zeros(dim))
        self._is_fitted = False

    @property
    def is_fitted(self) -> bool:
        """Whether `calibrate` has fitted it, or a file has brought it."""
        if not self._is_fitted and not torch.compiler.is_compiling():  # which could not look at values
            self.look_again()
        return self._is_fitted

    def fit(self, weight: Tensor) -> None:
        """Take w, shape `(d,)`; all zeros stand for a probe that is not fitted."""
        self.weight.copy_(weight)
        self.look_again()

    def look_again(self) -> None:
        """Find out anew whether it is fitted, after its weight was replaced, so that compiled code need not ask."""
        self._is_fitted = not self.weight.is_meta and bool(self.weight.any())

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """The score of every token, shape `(…,)`, in single precision: in half, many would be alike.

        Args:
            hidden_states: shape `(…, d)`.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            return hidden_states.detach().float() @ self.weight.float()


def count_outliers(tokens: Count, share: Share) -> Count:
    """⌈share · tokens⌉, by whole numbers alone."""
    return (tokens * share[0] + share[1] - 1) // share[1]


def choose_outliers(
    scores: Tensor, may_merge: Tensor, real: Tensor | None, starts: Tensor | None, share: Share
) -> Tensor:
    """The ⌈share · n⌉ highest tokens among those of each text that may be merged, n being its real tokens.

    Of tokens that score the same the first ones are taken. Looks at no value on the host.

    Args:
        scores: one for each token, shape `(batch, length)`.
        may_merge: which tokens may share a row, shape `(batch, length)`; never padding.
        real: which tokens are no padding, shape `(batch, length)`; `None`: all.
        starts: where texts start behind the first of a row, shape `(batch, length)`; `None`: nowhere.
        share: of a text's tokens.

    Returns:
        Shape `(batch, length)`.
    """
    candidates = scores.masked_fill(~may_merge, -torch.inf)
    order = _sorted(candidates, descending=True)
    present = torch.ones_like(order) if real is None else real.long()
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    if starts is None:
        tokens = present.sum(1, keepdim=True)
    else:
        text = starts.long().cumsum(1)
        order = order.gather(1, _sorted(text.gather(1, order), descending=False))
        _, tokens = count_before(text, present, scores.shape[1] + 1)
        before, _ = count_before(text, torch.ones_like(text), scores.shape[1] + 1)
        places = places - before.gather(1, order)
    rank = torch.zeros_like(order).scatter(1, order, places)
    return may_merge & (rank < count_outliers(tokens, share))


def _sorted(values: Tensor, descending: bool) -> Tensor:
    """The places of values in order, of equal ones the first one first; shape `(batch, length)`."""
    if torch.compiler.is_exporting():
        # ONNX has no other sorting than this one, which there puts the first of equals first.
        return torch.sort(values, dim=1, descending=descending).indices
    return torch.sort(values, dim=1, descending=descending, stable=True).indices


class LeastSquares:
    """Sums over tokens from which a probe is fitted, in double precision."""

    def __init__(self, dim: int, device: torch.device) -> None:
        # Behind the inputs one column for the target, and one of ones, whose sums are the others' means.
        self.sums = torch.zeros(dim + 2, dim + 2, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Count tokens in.

        Args:
            inputs: shape `(tokens, d)`.
            targets: shape `(tokens,)`.
        """
        columns = torch.cat([inputs, targets.unsqueeze(1), torch.ones_like(targets).unsqueeze(1)], dim=1).double()
        self.sums += columns.t() @ columns

    def solve(self) -> Tensor | None:
        """w, shape `(d,)`; `None` where inputs or targets do not vary."""
        count = self.sums[-1, -1]
        mean = self.sums[-1, :-1] / count
        covariance = self.sums[:-1, :-1] / count - torch.outer(mean, mean)
        inputs, targets = covariance[:-1, :-1], covariance[:-1, -1]
        ridge = RIDGE * inputs.diagonal().mean()
        if not ridge > 0:
            return None  # all tokens are alike
        weight = torch.linalg.solve(inputs + ridge * torch.eye(len(inputs)).to(inputs), targets)
        return weight if bool(weight.isfinite().all()) and bool(weight.any()) else None
