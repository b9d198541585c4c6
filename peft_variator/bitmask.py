"""Masks of weights, one bit a weight: the only place that knows how the bits lie, and how rows are cut into blocks.

The layout is that of the `bitmask` of sparse-24-bitmask checkpoints, uint8 (rows, ceil(columns / 8)): bit i of byte j
stands for column 8·j + i (little bit order), the bits beyond the last column are 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


__all__ = ["mask_width", "pack_mask", "row_blocks", "unpack_mask"]

# Weights handled at a time: the temporaries, 4 bytes a weight, then stay in the cache of a core.
_WEIGHTS_AT_ONCE = 1 << 19


def mask_width(columns: int) -> int:
    """Bytes of the packed mask of one row."""
    return -(-columns // 8)


def row_blocks(rows: int, columns: int, weights_at_once: int = _WEIGHTS_AT_ONCE) -> list[slice]:
    """Slices of about `weights_at_once` weights each that cover the rows of a (rows, columns) matrix."""
    step = max(1, weights_at_once // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack_mask(mask: Tensor) -> Tensor:
    """bool (rows, columns) -> uint8 (rows, ceil(columns / 8))."""
    rows, columns = mask.shape
    bits = F.pad(mask.to(torch.uint8), (0, -columns % 8)).reshape(rows, mask_width(columns), 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.mul_(powers).sum(dim=-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_mask`: uint8 (rows, ceil(columns / 8)) -> bool (rows, columns)."""
    # Each byte looks up its eight bools as one int64: several times faster than shifting bits apart.
    table = _bools_of_bytes if torch.compiler.is_compiling() else _cached_bools_of_bytes
    eight_bools = table(packed.device).take(packed.long())
    return eight_bools.view(torch.bool)[:, :columns]


def _bools_of_bytes(device: torch.device) -> Tensor:
    """int64 (256,): the eight bits of every byte as bools, side by side in memory."""
    all_bytes = torch.arange(256, device=device).unsqueeze(1)
    bits = all_bytes.bitwise_right_shift(torch.arange(8, device=device)).bitwise_and(1)
    return bits.to(torch.bool).view(torch.int64).flatten()


@lru_cache(maxsize=16)
def _cached_bools_of_bytes(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the table outlives the inference mode that it may first be needed in
        return _bools_of_bytes(device)
