"""The layouts in which checkpoints store the weight of a linear layer, as pure functions on their tensors.

- `sparse-24-bitmask`: the layout of `peft_variator.bases.layout`.
- `sparse-bitmask`: `compressed` (non-zero weights,), `bitmask` as above with any number of bits, `shape`, and
  `row_offsets` (out_features,), where the values of each row start. A vector counts as one row.
- `dense`: `weight` (out_features, in_features).

Each can hold 8-bit values, float8_e4m3fn or int8, beside a `weight_scale` for the tensor (1,), for each output
(out_features, 1) or for each group of inputs (out_features, groups), and a `weight_zero_point` of the same shape. The
weight is then (value - zero point) · scale; only zero points of 0 leave pruned weights at 0, so no other is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .bits import mask_width
from .layout import LayoutError, PackedWeight, check_packed, gather_kept, pack, unpack, unpack_mask


__all__ = ["Layout", "Parts", "check_parts", "decode_dense", "decode_packed"]

Layout = Literal["sparse-24-bitmask", "sparse-bitmask", "dense"]
Parts = Mapping[str, Tensor]
"""The tensors of a stored weight by part: `"compressed"`, `"bitmask"`, `"weight_scale"` and so on."""

_FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)


def check_parts(layout: Layout, parts: Parts, name: str) -> None:
    """Check all that can be wrong with a stored weight, without decoding it.

    Raises:
        LayoutError: naming the tensor, as a part of `name`, and, where there is one, the row.
    """
    main = "weight" if layout == "dense" else "compressed"
    if parts[main].dtype not in (*_FLOATING_DTYPES, *_QUANTIZED_DTYPES):
        raise LayoutError(f"{name}.{main} is {parts[main].dtype}, which is no dtype of a weight.")
    if "shape" in parts and parts["shape"].dtype != torch.int64:
        raise LayoutError(f"{name}.shape is {parts['shape'].dtype}, but sizes are torch.int64.")
    _CHECKS[layout](parts, name)
    if parts[main].dtype in _QUANTIZED_DTYPES and "weight_scale" not in parts:
        raise LayoutError(f"{name} holds 8-bit values, but {name}.weight_scale is missing.")
    zero_point = parts.get("weight_zero_point")
    if zero_point is not None and zero_point.float().any():
        rows = zero_point.float().reshape(len(zero_point) if zero_point.ndim else 1, -1).any(dim=1)
        raise LayoutError(
            f"{name}.weight_zero_point, row {int(rows.nonzero()[0])}: it is not 0, so the weights that pruning "
            "removed would not be 0."
        )


def decode_packed(layout: Layout, parts: Parts, dtype: torch.dtype, name: str) -> PackedWeight:
    """The packed weight in `dtype`; a product with a scale is rounded once, to `dtype`.

    Raises:
        LayoutError: the weight is not 2:4, or the parts don't fit together.
    """
    if layout != "sparse-24-bitmask":
        return pack(decode_dense(layout, parts, dtype, name), f"{name}.weight" if layout == "dense" else name)
    packed = PackedWeight(parts["compressed"], parts["bitmask"], parts["shape"])
    check_packed(packed, name)
    values = packed.compressed
    if "weight_scale" in parts:
        scale = _spread_scale(parts["weight_scale"], len(values), 2 * values.shape[1], name)
        values = values.float() * (scale if scale.shape[1] == 1 else gather_kept(scale, packed.bitmask))
    values = values.to(dtype)
    return PackedWeight(values.masked_fill(values == 0, 0.0), packed.bitmask, packed.shape.reshape(2, 1))


def decode_dense(layout: Layout, parts: Parts, dtype: torch.dtype, name: str) -> Tensor:
    """The dense weight (out_features, in_features), or vector, in `dtype`.

    Raises:
        LayoutError: the parts don't fit together.
    """
    if layout == "sparse-24-bitmask":
        packed = decode_packed(layout, parts, dtype, name)
        return unpack(packed.compressed, packed.bitmask, 2 * packed.compressed.shape[1])
    values = parts["weight"] if layout == "dense" else _scatter_rows(parts, name)
    if "weight_scale" not in parts:
        return values.to(dtype)
    weight = values.float() * _spread_scale(parts["weight_scale"], values.shape[0], values.shape[1], name)
    return weight.masked_fill_(weight == 0, 0.0).to(dtype)


def _spread_scale(scale: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A stored scale in float32 as (1, 1), (rows, 1) or (rows, columns)."""
    if scale.numel() == 1:
        return scale.float().reshape(1, 1)
    if scale.ndim == 2 and scale.shape[0] == rows and scale.shape[1] and columns % scale.shape[1] == 0:
        groups = scale.shape[1]
        return scale.float() if groups == 1 else scale.float().repeat_interleave(columns // groups, dim=1)
    raise LayoutError(
        f"{name}.weight_scale has shape {tuple(scale.shape)}, but a {rows}×{columns} weight has one scale, one for "
        f"each row, ({rows}, 1), or one for each group of columns, ({rows}, groups)."
    )


def _scatter_rows(parts: Parts, name: str) -> Tensor:
    """The dense weight of a `sparse-bitmask`, in the dtype of its values."""
    _check_sparse_bitmask(parts, name)
    size, values = parts["shape"].flatten().tolist(), parts["compressed"]
    if values.element_size() == 1:
        values = values.view(torch.uint8)  # 8-bit floats can't be indexed
    weight = values.new_zeros(size)
    weight.view(-1, size[-1])[unpack_mask(parts["bitmask"].view(-1, mask_width(size[-1])), size[-1])] = values
    return weight.view(parts["compressed"].dtype)


def _check_sparse_24(parts: Parts, name: str) -> None:
    check_packed(PackedWeight(parts["compressed"], parts["bitmask"], parts["shape"]), name)


def _check_sparse_bitmask(parts: Parts, name: str) -> None:
    size, bitmask, values = parts["shape"].flatten().tolist(), parts["bitmask"], parts["compressed"]
    if not 1 <= len(size) <= 2 or min(size) < 1:
        raise LayoutError(f"{name}.shape holds {size}, but a matrix has two positive sizes and a vector one.")
    width = mask_width(size[-1])
    if tuple(bitmask.shape) != (*size[:-1], width) or bitmask.dtype != torch.uint8:
        raise LayoutError(
            f"{name}.bitmask is {bitmask.dtype} {tuple(bitmask.shape)}, but a weight of shape {size} has torch.uint8 "
            f"{(*size[:-1], width)}."
        )
    bits = unpack_mask(bitmask.view(-1, width), 8 * width)
    if bits[:, size[-1] :].any():
        row = int(bits[:, size[-1] :].any(dim=1).nonzero()[0])
        raise LayoutError(f"{name}.bitmask, row {row}: bits are set past the last column. The file is damaged.")
    counts, offsets = bits.sum(dim=1), parts["row_offsets"].flatten()
    if offsets.shape != counts.shape:
        raise LayoutError(f"{name}.row_offsets has {len(offsets)} entries, but the weight has {len(counts)} rows.")
    ends = torch.cat((offsets[1:], offsets.new_tensor([len(values)])))
    if not torch.equal(offsets + counts, ends):
        row = int((offsets + counts != ends).nonzero()[0])
        raise LayoutError(
            f"{name}.bitmask, row {row}: it keeps {int(counts[row])} weights, but row_offsets give it "
            f"{int(ends[row] - offsets[row])} of the {len(values)} values. The file is damaged."
        )


_CHECKS: dict[Layout, Callable[[Parts, str], None]] = {
    "sparse-24-bitmask": _check_sparse_24,
    "sparse-bitmask": _check_sparse_bitmask,
    "dense": lambda parts, name: None,
}
