"""The layout of sparse-24-bitmask, written from its description with plain loops: what the tests compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def prune_two_four(weight: Tensor, seed: int = 0) -> Tensor:
    """`weight` with two random weights of every four set to +0.0."""
    generator = torch.Generator().manual_seed(seed)
    groups = weight.clone().view(-1, 4)
    order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
    return groups.scatter_(1, order[:, :2], 0.0).view_as(weight)


def two_four(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A random 2:4 (rows, columns)."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return prune_two_four(weight, seed).to(dtype)


def two_four_linear(rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    """A dense layer with a random 2:4 weight."""
    linear = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    linear.weight.data = two_four(rows, columns, dtype)
    return linear


def reference_bits(mask: Tensor) -> Tensor:
    """bool (rows, columns) -> uint8 (rows, ceil(columns / 8)), bit i of byte j for column 8·j + i."""
    rows, columns = mask.shape
    packed = [[0] * ((columns + 7) // 8) for _ in range(rows)]
    for row, kept in enumerate(mask.tolist()):
        for column in range(columns):
            if kept[column]:
                packed[row][column // 8] |= 1 << (column % 8)
    return torch.tensor(packed, dtype=torch.uint8).reshape(rows, (columns + 7) // 8)


def reference_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`compressed` and `bitmask` of a 2:4 weight; a group with fewer than two non-zeros keeps its first zeros."""
    rows, columns = weight.shape
    places = []
    for nonzero in (weight != 0).tolist():
        for first in range(0, columns, 4):
            kept = [column for column in range(first, first + 4) if nonzero[column]]
            for column in range(first, first + 4):
                if len(kept) < 2 and column not in kept:
                    kept.append(column)
            places += sorted(kept)
    columns_kept = torch.tensor(places, dtype=torch.int64).reshape(rows, columns // 2)
    values = weight.gather(1, columns_kept)
    values[values == 0] = 0  # not -0.0
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, columns_kept, True)
    return values, reference_bits(mask)


def reference_unpack(compressed: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """The dense weight, value by value."""
    weight = torch.zeros(len(compressed), columns, dtype=compressed.dtype)
    for row, bytes_ in enumerate(bitmask.tolist()):
        kept = [column for column in range(columns) if bytes_[column // 8] >> (column % 8) & 1]
        weight[row, kept] = compressed[row]
    return weight


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, the sign of zeros and NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
