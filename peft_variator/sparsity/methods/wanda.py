"""Wanda (Sun et al., arXiv 2306.11695): |w| times the norm of the input it multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..statistics import InputStatistics
from .base import ScoredMethod, register_method


if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["Wanda"]


@register_method
@dataclass
class Wanda(ScoredMethod):
    """Keep the largest scores of each output row (section 3, "comparison group"), or of each group of a pattern."""

    name = "wanda"
    statistics = InputStatistics

    def score(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        """S_ij = |W_ij| * ||X_j||_2, equation 1, in the dtype of the norms."""
        return weight.abs().to(statistics.norm.dtype) * statistics.norm
