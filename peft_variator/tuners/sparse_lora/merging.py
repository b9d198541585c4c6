"""Merging an update into a pruned weight, with every zero where it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch


__all__ = ["merge_update", "sum_updates"]


@torch.no_grad()
def sum_updates(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """ΔW = Σ s·B·A, (out, in), in float32, or in `dtype` where that is wider.

    Args:
        a: A of each adapter, (rank, in).
        b: B of each adapter, (out, rank).
        scales: s of each adapter.
        dtype: that of the weight to update.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    total = b[0].new_zeros(b[0].shape[0], a[0].shape[1], dtype=dtype)
    for one_a, one_b, scale in zip(a, b, scales, strict=True):
        total.addmm_(one_b.to(dtype), one_a.to(dtype), alpha=scale)
    return total


def merge_update(weight: torch.Tensor, update: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(W + ΔW) ⊙ M, summed in float32 or better and rounded once.

    The zeros of the result are the zeros of the mask, all of them +0.0: kernels for n:m sparsity have been seen to
    return garbage for -0.0. A weight that the update happens to cancel would be one zero more, and would look pruned
    from then on; it becomes the smallest positive number of its dtype instead. So merging -ΔW brings back every zero
    of W exactly, and the other weights to the rounding of their dtype.

    Args:
        weight: W, (out, in).
        update: ΔW, (out, in), in float32 or float64.
        kept: M, bool (out, in).

    Returns:
        (out, in), in the dtype of `weight`.
    """
    merged = (weight.to(update.dtype) + update).to(weight.dtype)
    merged = merged.masked_fill((merged == 0) & (weight != 0), _smallest(weight.dtype))
    return torch.where(kept & (merged != 0), merged, 0.0)


def _smallest(dtype: torch.dtype) -> float:
    """Smallest positive number that stays one; subnormals may be flushed, except float16's, computed in float32."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
