"""The effective weight (W + Σ s·B·A) ⊙ M, made a block of rows at a time.

The sum is made in float32 or better and rounded once, as in merging. Arguments are those of `kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layouts import get_layout
from .masks import unpack_mask


__all__ = ["kept_weights", "mask_", "masked_sum", "side_by_side"]

# Weights handled at a time. The temporaries, 4 bytes a weight, then stay in the cache of a CPU's core; on GPUs, where
# every launch costs, their memory is bounded.
_ON_CPUS, _ELSEWHERE = 1 << 19, 1 << 24


def kept_weights(packed_mask: Tensor | None, layout: str, base: list[Tensor]) -> Tensor:
    """The mask M, bool (out, in), True where the weight was not pruned."""
    if packed_mask is None:
        return get_layout(layout).kept(base)
    return unpack_mask(packed_mask, columns=get_layout(layout).shape(base)[1])


def _row_blocks(
    packed_mask: Tensor | None, layout: str, base: list[Tensor]
) -> Iterator[tuple[slice, Tensor | None, list[Tensor]]]:
    """Slices that cover the rows of the weight, each with its part of `packed_mask` and of `base`."""
    known = get_layout(layout)
    rows, columns = known.shape(base)
    if known.rows is None:
        yield slice(0, rows), packed_mask, base
        return
    step = max(1, (_ON_CPUS if base[0].device.type == "cpu" else _ELSEWHERE) // max(columns, 1))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, None if packed_mask is None else packed_mask[block], known.rows(base, block)


def side_by_side(a: list[Tensor], b: list[Tensor], scales: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s·A (Σ rank, in) and B (out, Σ rank) of all adapters: their product is Σ s·B·A."""
    scaled = [matrix.to(torch.promote_types(matrix.dtype, dtype)) * s for matrix, s in zip(a, scales, strict=True)]
    return torch.cat(scaled).to(dtype), torch.cat(b, dim=1).to(dtype)


def masked_sum(
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    packed_mask: Tensor | None,
    layout: str,
    base: list[Tensor],
    out: Tensor,
) -> Tensor:
    """Put the effective weight (W + Σ s·B·A) ⊙ M into `out`, (out, in), and return it."""
    wide = torch.promote_types(out.dtype, torch.float32)
    scaled_a, all_b = side_by_side(a, b, scales, wide)
    for rows, mask, tensors in _row_blocks(packed_mask, layout, base):
        weight, target = get_layout(layout).weight(tensors).to(wide), out[rows]
        total = torch.addmm(weight, all_b[rows], scaled_a, out=target if out.dtype == wide else None)
        # A product and not a masked_fill, which is several times slower on CPUs. The -0.0 that it leaves are of no
        # consequence here; merging, which stores the zeros, makes them +0.0.
        total.mul_(kept_weights(mask, layout, tensors).to(wide))
        if total is not target:
            target.copy_(total)
    return out


def mask_(matrix: Tensor, packed_mask: Tensor | None, layout: str, base: list[Tensor]) -> Tensor:
    """Multiply a matrix (out, in) by M, in place."""
    for rows, mask, tensors in _row_blocks(packed_mask, layout, base):
        matrix[rows].mul_(kept_weights(mask, layout, tensors).to(matrix.dtype))
    return matrix
