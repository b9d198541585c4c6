"""Magnitude pruning (Han et al., arXiv 1506.02626): the smallest |w| of a layer go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import ScoredMethod, register_method


if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["Magnitude"]


@register_method
@dataclass
class Magnitude(ScoredMethod):
    """Keep the largest |w| of the whole matrix, or of each group of an n:m pattern."""

    name = "magnitude"
    per_row = False

    def score(self, weight: Tensor, statistics: None) -> Tensor:
        import torch

        return weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
