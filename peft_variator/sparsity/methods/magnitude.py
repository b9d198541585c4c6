"""Magnitude pruning (Han et al., arXiv 1506.02626): the smallest |w| of a layer go."""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import Target, select


__all__ = ["magnitude_mask", "magnitude_scores"]


def magnitude_scores(weight: Tensor) -> Tensor:
    """|w|, in float32 or better, of the shape of `weight`."""
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))


def magnitude_mask(weight: Tensor, target: Target) -> Tensor:
    """Keep the largest |w| of the whole matrix, or of each group of an n:m pattern.

    Args:
        weight: (out_features, in_features).
        target: fraction removed, or an n:m pattern.

    Returns:
        bool (out_features, in_features), True where kept.
    """
    return select(magnitude_scores(weight), target, per_row=False)
