"""DSnoT (Zhang et al., arXiv 2310.08915): swap pruned and kept weights so that outputs keep their expected values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..patterns import Pattern, Target, apply_mask
from ..statistics import InputStatistics
from .base import METHODS, PruningMethod, option, register_method


if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["DSnoT", "dsnot_refine"]


def _pick(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each row's largest allowed score, (rows, 1), and whether the row has one, (rows, 1)."""
    index = scores.masked_fill(~allowed, -math.inf).argmax(dim=1, keepdim=True)
    return index, allowed.gather(1, index)


def _same_group(index: Tensor, width: int, target: Target) -> Tensor | bool:
    """Which columns may be swapped with column `index` (rows, 1): those of its n:m group, or all of them."""
    if not isinstance(target, Pattern):
        return True
    import torch

    columns = torch.arange(width, device=index.device)
    return columns // target.group == index // target.group


def dsnot_refine(
    weight: Tensor,
    mask: Tensor,
    statistics: InputStatistics,
    target: Target,
    max_cycles: int = 100,
    threshold: float = 0.1,
) -> Tensor:
    """Refine `mask` by growing and pruning one weight a row in each cycle; no weight changes its value.

    With the error e = E[sum over pruned j of W_ij X_j] of output i, a cycle grows the pruned weight with the largest
    sign(e) * W_ij * E[X_j] / Var(X_j) (the paper's growing criterion), then prunes, among the kept weights whose loss
    moves e back (sign(e) * W_ij * E[X_j] < 0), the one with the smallest |W_ij| * ||X_j|| (its pruning criterion).
    With an n:m pattern both lie in one group. Weights that were swapped are left alone from then on, and, other than
    in the paper, a swap that would not bring |e| down is not made: on small layers the plain rule overshoots.

    Args:
        weight: (out_features, in_features).
        mask: bool (out_features, in_features), True where kept: the mask to start from.
        statistics: norm, mean and variance of the inputs.
        target: what `mask` was chosen for; decides which weights may be swapped.
        max_cycles: how many swaps are tried in a row at most.
        threshold: rows with |e| at or below it are done, in units of the layer's outputs.

    Returns:
        the refined mask, with as many kept weights in each row (and group) as `mask`.
    """
    import torch

    mask = mask.clone()
    contribution = weight.detach().to(statistics.mean.dtype) * statistics.mean
    growth = contribution / statistics.variance.clamp_min(torch.finfo(contribution.dtype).tiny)
    importance = weight.detach().abs().to(contribution.dtype) * statistics.norm
    error = contribution.masked_fill(mask, 0.0).sum(dim=1, keepdim=True)
    growable, prunable = ~mask, mask.clone()
    for _ in range(max_cycles):
        sign = error.sign()
        active = error.abs() > threshold
        grown, found = _pick(growth * sign, growable & (contribution * sign > 0) & active)
        partners = prunable & (contribution * sign < 0) & _same_group(grown, weight.shape[1], target)
        pruned, paired = _pick(-importance, partners)
        if not found.any():
            break
        after = error + contribution.gather(1, pruned) - contribution.gather(1, grown)
        swap = found & paired & (after.abs() < error.abs())
        growable.scatter_(1, grown, growable.gather(1, grown) & ~found)
        prunable.scatter_(1, pruned, prunable.gather(1, pruned) & ~swap)
        mask.scatter_(1, grown, mask.gather(1, grown) | swap)
        mask.scatter_(1, pruned, mask.gather(1, pruned) & ~swap)
        error = torch.where(swap, after, error)
    return mask


@register_method
@dataclass
class DSnoT(PruningMethod):
    """Another method's mask, refined; the weights that stay keep their values."""

    name = "dsnot"
    statistics = InputStatistics

    initial_method: Literal["wanda", "magnitude"] = option("wanda", "Where the mask to start from comes from.")
    max_cycles: int = option(100, "Swaps tried in each row at most.", at_least=0)
    error_threshold: float = option(0.1, "An output whose expected error is at most this is left alone.", at_least=0.0)

    def solve(self, weight: Tensor, statistics: InputStatistics, target: Target) -> tuple[Tensor, Tensor]:
        mask, _ = METHODS[self.initial_method]().solve(weight, statistics, target)
        mask = dsnot_refine(weight, mask, statistics, target, self.max_cycles, self.error_threshold)
        return mask, apply_mask(weight, mask)
