"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column; later columns make up for the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..patterns import Pattern, Target, apply_mask, check_width, keep_largest, select
from ..statistics import GramStatistics
from .base import PruningMethod, option, register_method


if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["SparseGPT", "inverse_hessian_factor", "sparsegpt_prune"]


def inverse_hessian_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the inverse Hessian, U^T U = (X^T X + damping * mean(diagonal) * I)^-1.

    Args:
        gram: X^T X (in_features, in_features). Features that were never active get a one on the diagonal.
        damping: share of the diagonal's mean that is added to it (section 4).

    Returns:
        upper triangular (in_features, in_features), float64: the inverse of an ill-conditioned Gram matrix is the one
        place where float32 is not enough.

    Raises:
        ValueError: the damped matrix is not positive definite.
    """
    import torch

    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    diagonal.add_((diagonal == 0).double())
    diagonal.add_(damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed.any():
        raise ValueError(
            f"The Hessian of the inputs is not positive definite with damping={damping}. Raise damping (0.1, say) or "
            "use more calibration tokens."
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _block_mask(weight: Tensor, diagonal: Tensor, lost: int) -> Tensor:
    """Mask of one block of columns, all rows compared by the error that losing a weight makes, w^2 / [H^-1]_jj."""
    scores = (weight.square() / diagonal.square()).reshape(1, -1)
    return keep_largest(scores, lost).view_as(weight)


def _prune_block(weight: Tensor, factor: Tensor, mask: Tensor, pattern: Pattern | None) -> Tensor:
    """Prune the columns of one block in place, left to right (algorithm 1); returns their errors, (rows, columns)."""
    errors = weight.new_zeros(weight.shape)
    diagonal = factor.diagonal()
    for j in range(weight.shape[1]):
        if pattern is not None and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            mask[:, group] = select((weight[:, group] / diagonal[group]).square(), pattern, per_row=True)
        errors[:, j] = weight[:, j].masked_fill(mask[:, j], 0.0) / diagonal[j]
        weight[:, j:] -= errors[:, j].outer(factor[j, j:])
    return errors


def sparsegpt_prune(
    weight: Tensor, gram: Tensor, target: Target, damping: float = 0.01, block_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Choose a mask and update the weights that stay so that the layer's outputs change least (algorithm 1).

    Args:
        weight: (out_features, in_features).
        gram: X^T X over the calibration tokens (in_features, in_features).
        target: fraction removed, or an n:m pattern.
        damping: share of the mean of the Hessian's diagonal that is added to it.
        block_size: columns whose mask is chosen together, and whose updates to later columns are made at once. With a
            pattern, whole groups: as many as fit in, at least one.

    Returns:
        mask, bool (out_features, in_features), True where kept; and the new weight, of the shape and dtype of
        `weight`, +0.0 outside the mask.

    Raises:
        ValueError: the pattern does not divide in_features, or the Hessian is not positive definite.
    """
    import torch

    pattern, fraction = (target, 0.0) if isinstance(target, Pattern) else (None, target)
    if pattern is not None:
        check_width("the weight", weight.shape[1], pattern)
        block_size = max(block_size // pattern.group, 1) * pattern.group
    factor = inverse_hessian_factor(gram, damping).float()
    updated = weight.detach().to(torch.float32, copy=True)
    never_active = gram.diagonal() == 0
    updated[:, never_active] = 0.0  # so that they are the first to go
    mask = torch.ones_like(updated, dtype=torch.bool)
    removed = 0
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        columns = slice(start, stop)
        block = factor[columns, columns]
        if pattern is None:
            lost = int(fraction * len(weight) * stop + 0.5) - removed
            mask[:, columns] = _block_mask(updated[:, columns], block.diagonal(), lost)
            removed += lost
        errors = _prune_block(updated[:, columns], block, mask[:, columns], pattern)
        updated[:, stop:] -= errors @ factor[columns, stop:]
    updated[:, never_active] = weight[:, never_active].detach().float()
    return mask, apply_mask(updated.to(weight.dtype), mask)


@register_method
@dataclass
class SparseGPT(PruningMethod):
    """A mask chosen column by column; later columns make up for the error."""

    name = "sparsegpt"
    statistics = GramStatistics

    damping: float = option(0.01, "Share of the mean of the Hessian's diagonal added to it.", at_least=0.0)
    block_size: int = option(128, "Columns whose mask is chosen together; with a pattern, whole groups.", at_least=1)

    def solve(self, weight: Tensor, statistics: GramStatistics, target: Target) -> tuple[Tensor, Tensor]:
        return sparsegpt_prune(weight, statistics.gram, target, self.damping, self.block_size)
