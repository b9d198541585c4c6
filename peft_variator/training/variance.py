"""The scale of a teacher's hidden states, measured once before training.

A fixed scale, rather than one of each micro-batch, keeps the loss a plain mean over tokens: the same whether a batch
is cut into micro-batches, spread over processes, or resumed half-way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .losses import full_precision
from .terms import HiddenTerm


__all__ = ["HiddenStateVariance", "measure_variances"]


class HiddenStateVariance:
    """Running variance of hidden states around their mean vector over real tokens, one for each layer.

    Batches are merged as in Chan et al. 1983, "Algorithms for computing the sample variance", equation 2.1, which does
    not lose digits where the mean is far from zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: list[Tensor] = []
        self.deviations: list[Tensor] = []

    def update(self, layers: Sequence[Tensor], mask: Tensor | None) -> None:
        """Take in a batch.

        Args:
            layers: one tensor a layer, shape `(batch, length, dim)`.
            mask: real tokens, bool of shape `(batch, length)`; `None`: all of them.
        """
        tokens = [full_precision(layer.flatten(0, -2) if mask is None else layer[mask]) for layer in layers]
        added = len(tokens[0])
        if added == 0:
            return
        if not self.means:
            self.means = [torch.zeros_like(rows[0]) for rows in tokens]
            self.deviations = [rows.new_zeros(()) for rows in tokens]
        total = self.count + added
        for layer, rows in enumerate(tokens):
            mean = rows.mean(0)
            shift = mean - self.means[layer]
            spread = (rows - mean).square().mean(1).sum()
            self.deviations[layer] += spread + shift.square().mean() * (self.count * added / total)
            self.means[layer] += shift * (added / total)
        self.count = total

    def result(self) -> Tensor:
        """The variances, a mean over `dim`, shape `(layers,)`.

        Raises:
            ValueError: no real token was seen, or the hidden states of a layer are all the same.
        """
        if self.count == 0:
            raise ValueError(
                "The batches held no real token, so hidden states have no variance. Check the data's masks."
            )
        variance = torch.stack(self.deviations) / self.count
        if not bool(((variance > 0) & variance.isfinite()).all()):
            raise ValueError(
                f"The teacher's hidden states have variances {variance.tolist()} over {self.count} tokens; each has "
                "to be finite and above 0 to compare with. Check the data and the teacher's weights, or use more "
                "variance_samples."
            )
        return variance


def measure_variances(
    terms: Sequence[HiddenTerm], sample: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Give every term the scale of the teacher's hidden states.

    Args:
        terms: parts of the loss.
        sample: batches, each with the teacher's outputs on it.

    Raises:
        ValueError: the batches held no real token, or the hidden states of a layer are all the same.
    """
    variances = [HiddenStateVariance() for _ in terms]
    for inputs, outputs in sample:
        for term, variance in zip(terms, variances, strict=True):
            variance.update(term.states(outputs), term.mask(inputs))
    for term, variance in zip(terms, variances, strict=True):
        term.variance = variance.result()
