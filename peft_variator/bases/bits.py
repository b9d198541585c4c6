"""Bits of a 2:4 bitmask: a byte stands for eight columns, its halves for two groups of four (little bit order)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


__all__ = [
    "bools",
    "fill_groups",
    "kept_places",
    "mask_width",
    "nonzero_bits",
    "overfull",
    "row_blocks",
    "wrong_bytes",
]

# Weights handled at a time: the temporaries, 4 bytes a weight, then stay in the cache of a core.
_WEIGHTS_AT_ONCE = 1 << 19


def mask_width(in_features: int) -> int:
    """Bytes of the bitmask of one row."""
    return -(-in_features // 8)


def row_blocks(rows: int, columns: int, weights_at_once: int = _WEIGHTS_AT_ONCE) -> list[slice]:
    """Slices of about `weights_at_once` weights each that cover the rows of a (rows, columns) matrix."""
    step = max(1, weights_at_once // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def nonzero_bits(block: Tensor) -> Tensor:
    """Where a dense (rows, columns) is non-zero, one bit a weight: uint8 (rows, ceil(columns / 8))."""
    kept = F.pad((block != 0).to(torch.uint8), (0, -block.shape[1] % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=block.device)
    return kept.view(len(block), mask_width(block.shape[1]), 8).mul_(powers).sum(dim=-1, dtype=torch.uint8)


def overfull(bits: Tensor) -> Tensor:
    """bool, shape of the uint8 `bits`: whether a half of each byte has more than two bits set."""
    return _tables(bits.device).overfull.index_select(0, bits.reshape(-1).int()).view(bits.shape)


def fill_groups(bits: Tensor, in_features: int) -> Tensor:
    """`bits` (rows, ceil(in_features / 8)), with the lowest free ones set until every group of four has two."""
    filled = _tables(bits.device).filled.index_select(0, bits.reshape(-1).int()).view(bits.shape)
    if in_features % 8:
        filled[:, -1] &= 15
    return filled


def wrong_bytes(bitmask: Tensor, in_features: int) -> Tensor:
    """uint8, shape of `bitmask`: 0 where a byte keeps two of either half, and nothing past the end, else not 0."""
    # Counting bits in parallel (Hacker's Delight, 5-1) is faster here than looking the bytes up.
    pairs = bitmask - (bitmask.bitwise_right_shift(1) & 0x55)
    counts = (pairs & 0x33) + (pairs.bitwise_right_shift(2) & 0x33)
    wrong = counts ^ 0x22
    if in_features % 8:
        wrong[:, -1] = counts[:, -1] ^ 0x02
    return wrong


def kept_places(bitmask: Tensor, in_features: int) -> Tensor:
    """Columns of the kept weights, in order: int64 (bytes, 4), counted within eight columns, or, where rows do not end
    on a byte, (nibbles, 2), counted within four."""
    tables = _tables(bitmask.device)
    if in_features % 8 == 0:
        return tables.places_in_byte.index_select(0, bitmask.reshape(-1).int())
    nibbles = torch.stack((bitmask & 15, bitmask.bitwise_right_shift(4)), dim=-1).flatten(1)[:, : in_features // 4]
    return tables.places_in_nibble.index_select(0, nibbles.reshape(-1).int())


def bools(bitmask: Tensor) -> Tensor:
    """uint8 (rows, width) -> bool (rows, 8 · width), one element a bit."""
    unpacked = _tables(bitmask.device).bools.index_select(0, bitmask.reshape(-1).int())
    return unpacked.view(torch.bool).view(bitmask.shape[0], 8 * bitmask.shape[1])


class _Tables(NamedTuple):
    """What to know of every value of a byte, on one device."""

    bools: Tensor  # uint8 (256, 8): the bits, each in a byte of its own
    filled: Tensor  # uint8 (256,)
    overfull: Tensor  # bool (256,)
    places_in_byte: Tensor  # int64 (256, 4)
    places_in_nibble: Tensor  # int64 (16, 2)


@lru_cache(maxsize=16)
def _tables(device: torch.device) -> _Tables:
    kept = [[bit for bit in range(4) if nibble >> bit & 1] for nibble in range(16)]
    # A nibble with more than two bits is refused before its entry is used; the entry only has to be in range.
    places = [sorted((bits + [bit for bit in range(4) if bit not in bits])[:2]) for bits in kept]
    halves = [(byte & 15, byte >> 4) for byte in range(256)]
    in_byte = [places[low] + [4 + place for place in places[high]] for low, high in halves]
    with torch.inference_mode(False):  # the tables outlive the inference mode that they may first be needed in
        return _Tables(
            bools=_byte_table([[byte >> bit & 1 for bit in range(8)] for byte in range(256)], device),
            filled=_byte_table([sum(1 << place for place in row) for row in in_byte], device),
            overfull=_byte_table([max(len(kept[low]), len(kept[high])) > 2 for low, high in halves], device).bool(),
            places_in_byte=torch.tensor(in_byte, device=device),
            places_in_nibble=torch.tensor(places, device=device),
        )


def _byte_table(rows: list, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8, device=device)
