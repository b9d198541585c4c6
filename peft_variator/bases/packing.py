"""The packed form of a 2:4 weight, as pure tensor functions: pack, unpack, read the mask, check.

A weight is 2:4 when at most two of every four consecutive inputs of a row are non-zero (arXiv 2104.08378). Its packed
form is the tensor layout of `sparse-24-bitmask` checkpoints:

- `compressed` (out_features, in_features / 2): the two kept values of every group of four, in column order;
- `bitmask` uint8 (out_features, ceil(in_features / 8)): bit i of byte j says whether column 8·j + i is kept (little
  bit order), exactly two bits in every group of four, the bits beyond the last column 0;
- `shape` int64 (2, 1): out_features and in_features.

That is 0.5625 of the bytes of a 16-bit weight, 0.53125 of a 32-bit one. A group with fewer than two non-zero weights
keeps zeros in its free places. Every zero is stored, and comes back, as +0.0: 2:4 kernels read a stored -0.0 as a
value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..bitmask import mask_width, pack_mask, row_blocks, unpack_mask
from ..weight_kernels.product import MIN_WEIGHTS
from ..weight_kernels.unpacking import can_unpack, unpack_into


__all__ = [
    "LayoutError",
    "PackedWeight",
    "check_bitmask",
    "check_packed",
    "check_packed_sizes",
    "gather_kept",
    "is_two_four",
    "pack",
    "unpack",
]


_PACKABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LayoutError(ValueError):
    """A weight that is not 2:4, or packed tensors that do not follow the layout."""


class PackedWeight(NamedTuple):
    """The three tensors of a packed weight; see the module for their shapes."""

    compressed: Tensor
    bitmask: Tensor
    shape: Tensor


def pack(weight: Tensor, name: str = "weight") -> PackedWeight:
    """Pack a dense 2:4 weight; `unpack` gives it back bit for bit, except that -0.0 becomes +0.0.

    Args:
        weight: (out_features, in_features), float32, bfloat16, float16 or float64, in_features a multiple of four.
            Infinities and NaN are values like any other.
        name: what to call the weight in an error.

    Raises:
        LayoutError: the weight has another shape or dtype, or some group of four has more than two non-zero weights;
            the message names the row and the columns.
    """
    _check_packable(weight, name)
    out_features, in_features = weight.shape
    compressed = weight.new_empty(out_features, in_features // 2)
    bitmask = torch.empty(out_features, mask_width(in_features), dtype=torch.uint8, device=weight.device)
    for rows in row_blocks(out_features, in_features):
        bits = pack_mask(weight[rows] != 0)
        if _exceeds_two_four(bits).any():
            raise LayoutError(_not_two_four(name, weight[rows], rows.start))
        bitmask[rows] = _fill_groups(bits, in_features)
        compressed[rows] = gather_kept(weight[rows], bitmask[rows])
    return PackedWeight(compressed, bitmask, torch.tensor([[out_features], [in_features]], device=weight.device))


def unpack(compressed: Tensor, bitmask: Tensor, in_features: int, out: Tensor | None = None) -> Tensor:
    """The dense weight of packed tensors that `check_bitmask` accepts.

    Args:
        compressed: (out_features, in_features / 2), any dtype.
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        in_features: inputs of the weight; the bitmask alone does not tell where the last byte ends.
        out: where to write, contiguous (out_features, in_features) of the dtype of `compressed`; else a new tensor.

    Returns:
        (out_features, in_features), zeros +0.0.
    """
    if out is None:
        out = compressed.new_empty(compressed.shape[0], in_features)
    if out.numel() >= MIN_WEIGHTS and can_unpack(compressed, bitmask, out):
        unpack_into(compressed, bitmask, out)
        return out
    # Bits are moved instead of numbers: it is the same for every dtype, and copies of bfloat16 may rewrite NaNs.
    integer = _INTEGER_OF_SIZE[compressed.element_size()]
    source, target = compressed.contiguous().view(integer), out.view(integer)
    for rows in row_blocks(out.shape[0], in_features):
        places = _kept_columns(bitmask[rows], in_features)
        groups = target[rows].view(-1, 2 * places.shape[1])
        groups.zero_().scatter_(1, places, source[rows].view(places.shape))
    return out


def gather_kept(weight: Tensor, bitmask: Tensor) -> Tensor:
    """The values of a dense weight at the places that a bitmask keeps, with every zero +0.0.

    Args:
        weight: (rows, in_features).
        bitmask: uint8 (rows, ceil(in_features / 8)) with two bits in every group of four.

    Returns:
        (rows, in_features / 2) of the dtype of `weight`.
    """
    in_features = weight.shape[1]
    kept = weight.new_empty(weight.shape[0], in_features // 2)
    integer = _INTEGER_OF_SIZE[weight.element_size()]  # see unpack
    source, target = weight.view(integer), kept.view(integer)
    for rows in row_blocks(weight.shape[0], in_features):
        places = _kept_columns(bitmask[rows], in_features)
        target[rows] = source[rows].reshape(-1, 2 * places.shape[1]).gather(1, places).view(-1, in_features // 2)
    target.masked_fill_(kept == 0, 0)
    return kept


def is_two_four(weight: Tensor) -> bool:
    """Whether `pack` accepts the weight: a matrix, inputs in whole groups of four, at most two non-zero in each."""
    if weight.ndim != 2 or weight.dtype not in _PACKABLE or weight.shape[1] == 0 or weight.shape[1] % 4:
        return False
    return not any(_exceeds_two_four(pack_mask(weight[rows] != 0)).any() for rows in row_blocks(*weight.shape))


def check_packed(packed: PackedWeight, name: str) -> None:
    """Raise LayoutError unless the three tensors follow the layout; `name` is the module that they belong to."""
    compressed, bitmask = packed.compressed, packed.bitmask
    check_packed_sizes(packed.shape, compressed.shape, bitmask.shape, bitmask.dtype, name)
    check_bitmask(bitmask, 2 * compressed.shape[1], f"{name}.bitmask")


def check_packed_sizes(
    shape: Tensor, compressed: tuple[int, ...], bitmask: tuple[int, ...], bitmask_dtype: torch.dtype, name: str
) -> None:
    """Raise LayoutError unless tensors of these shapes are the parts of a packed weight; see `check_packed`.

    Args:
        shape: the part with the two sizes of the dense weight.
        compressed: shape of the kept values.
        bitmask: shape of the bitmask.
        bitmask_dtype: dtype of the bitmask.
        name: the module that they belong to.
    """
    size = shape.flatten().tolist()
    if len(size) != 2 or min(size) < 0 or size[1] == 0 or size[1] % 4:
        raise LayoutError(f"{name}.shape holds {size}, but a packed weight has two sizes, the second a multiple of 4.")
    if bitmask_dtype != torch.uint8:
        raise LayoutError(f"{name}.bitmask is {bitmask_dtype}, but a bitmask is torch.uint8.")
    wanted = {"compressed": (size[0], size[1] // 2), "bitmask": (size[0], mask_width(size[1]))}
    for part, found in (("compressed", compressed), ("bitmask", bitmask)):
        if tuple(found) != wanted[part]:
            raise LayoutError(
                f"{name}.{part} has shape {tuple(found)}, but a 2:4 weight of {size[0]}×{size[1]} has {wanted[part]}."
            )


def check_bitmask(bitmask: Tensor, in_features: int, name: str = "bitmask") -> None:
    """Raise LayoutError unless every group of four keeps exactly two weights and the bits past the end are 0.

    Args:
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        in_features: inputs of the weight, a multiple of four.
        name: what to call the tensor in the error, which also names the row.
    """
    for rows in row_blocks(len(bitmask), in_features, weights_at_once=1 << 20):  # temporaries stay in the cache
        wrong = _malformed_bytes(bitmask[rows], in_features)
        if wrong.any():
            row = rows.start + int(wrong.any(dim=1).nonzero()[0])
            raise LayoutError(f"{name}, row {row}: {_describe_malformed(bitmask[row], in_features)}")


def _check_packable(weight: Tensor, name: str) -> None:
    if weight.ndim != 2 or weight.dtype not in _PACKABLE:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _PACKABLE)
        raise LayoutError(
            f"{name} is a {weight.dtype} tensor of shape {tuple(weight.shape)}, but only matrices of {dtypes} can be "
            "packed."
        )
    if weight.shape[1] == 0 or weight.shape[1] % 4:
        raise LayoutError(f"{name} has {weight.shape[1]} inputs, which do not fill groups of 4, so it can't be 2:4.")


def _not_two_four(name: str, block: Tensor, first_row: int) -> str:
    counts = (block != 0).view(len(block), -1, 4).sum(dim=-1)
    row, group = (counts > 2).nonzero()[0].tolist()
    return (
        f"{name}, row {first_row + row}: columns {4 * group} to {4 * group + 3} have {int(counts[row, group])} "
        "non-zero weights, but 2:4 allows 2 of every 4. Prune the model to 2:4 first, or leave this module dense."
    )


def _describe_malformed(row: Tensor, in_features: int) -> str:
    counts = unpack_mask(row.unsqueeze(0), in_features).view(-1, 4).sum(dim=1).tolist()
    group = next((index for index, count in enumerate(counts) if count != 2), None)
    if group is None:
        return f"bits are set past the last column, {in_features - 1}. The file is damaged."
    return (
        f"columns {4 * group} to {4 * group + 3} keep {counts[group]} weights, but a 2:4 bitmask keeps exactly 2 of "
        "every 4. The file is damaged, or the model is not 2:4."
    )


def _exceeds_two_four(bits: Tensor) -> Tensor:
    """bool, shape of the uint8 `bits`: whether a half of each byte has more than two bits set."""
    return _tables(bits.device).exceeds.index_select(0, bits.reshape(-1).int()).view(bits.shape)


def _fill_groups(bits: Tensor, in_features: int) -> Tensor:
    """`bits` (rows, ceil(in_features / 8)), with the lowest free ones set until every group of four has two."""
    filled = _tables(bits.device).filled.index_select(0, bits.reshape(-1).int()).view(bits.shape)
    if in_features % 8:
        filled[:, -1] &= 15
    return filled


def _malformed_bytes(bitmask: Tensor, in_features: int) -> Tensor:
    """uint8, shape of `bitmask`: 0 where a byte keeps two of either half, and nothing past the end, else not 0."""
    # Counting bits in parallel (Hacker's Delight, 5-1) is faster here than looking the bytes up.
    pairs = bitmask - (bitmask.bitwise_right_shift(1) & 0x55)
    counts = (pairs & 0x33) + (pairs.bitwise_right_shift(2) & 0x33)
    wrong = counts ^ 0x22
    if in_features % 8:
        wrong[:, -1] = counts[:, -1] ^ 0x02
    return wrong


def _kept_columns(bitmask: Tensor, in_features: int) -> Tensor:
    """Columns of the kept weights, in order: int64 (bytes, 4), counted within eight columns, or, where rows do not end
    on a byte, (nibbles, 2), counted within four."""
    tables = _tables(bitmask.device)
    if in_features % 8 == 0:
        return tables.places_in_byte.index_select(0, bitmask.reshape(-1).int())
    nibbles = torch.stack((bitmask & 15, bitmask.bitwise_right_shift(4)), dim=-1).flatten(1)[:, : in_features // 4]
    return tables.places_in_nibble.index_select(0, nibbles.reshape(-1).int())


class _Tables(NamedTuple):
    """What to know of every value of a byte, on one device."""

    filled: Tensor  # uint8 (256,)
    exceeds: Tensor  # bool (256,)
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
            filled=_byte_table([sum(1 << place for place in row) for row in in_byte], device),
            exceeds=_byte_table([max(len(kept[low]), len(kept[high])) > 2 for low, high in halves], device).bool(),
            places_in_byte=torch.tensor(in_byte, device=device),
            places_in_nibble=torch.tensor(places, device=device),
        )


def _byte_table(rows: list, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8, device=device)
