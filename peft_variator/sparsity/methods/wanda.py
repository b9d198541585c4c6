"""Wanda (Sun et al., arXiv 2306.11695): |w| times the norm of the input it multiplies."""

from __future__ import annotations

from torch import Tensor

from ..patterns import Target, select


__all__ = ["wanda_mask", "wanda_scores"]


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2, equation 1, in the dtype of `input_norm`.

    Args:
        weight: (out_features, in_features).
        input_norm: l2 norm of each input feature over the calibration tokens, (in_features,).

    Returns:
        (out_features, in_features).
    """
    return weight.detach().abs().to(input_norm.dtype) * input_norm


def wanda_mask(weight: Tensor, input_norm: Tensor, target: Target) -> Tensor:
    """Keep the largest scores of each output row (section 3, "comparison group"), or of each group of an n:m pattern.

    Args:
        weight: (out_features, in_features).
        input_norm: l2 norm of each input feature over the calibration tokens, (in_features,).
        target: fraction removed, or an n:m pattern.

    Returns:
        bool (out_features, in_features), True where kept.
    """
    return select(wanda_scores(weight, input_norm), target, per_row=True)
