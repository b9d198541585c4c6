"""The product of a packed 2:4 weight and a few tokens on a GPU, in Triton: it reads the packed form as it lies.

A program has a block of rows and walks over their columns: for each it looks up the bit in the mask, loads the value
where one is kept (0.5625 of the bytes of a dense weight in 16 bits), and multiplies the block with all tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import is_interpreted


__all__ = ["multiply_triton"]

_ROWS, _COLUMNS, _TOKENS = 32, 128, 16
"""Of a tile; tokens are as many as a product of tiles takes at least."""


@triton.jit
def _packed_kernel(
    x, compressed, bitmask, bias, output, tokens, rows, columns, mask_width,
    HAS_BIAS: tl.constexpr, ONE_TOKEN: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    of_one = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        byte = tl.load(bitmask + row[:, None] * mask_width + (column // 8)[None, :], mask=inside, other=0).to(tl.int32)
        group = byte >> ((column // 4 % 2) * 4)[None, :]
        place = (column % 4)[None, :]
        kept = inside & (((group >> place) & 1) != 0)
        # The second of the two values of a group where one is kept before this column.
        second = (group & ((1 << place) - 1) & 15) != 0
        value = compressed + row[:, None] * (columns // 2) + (column // 4 * 2)[None, :] + second.to(tl.int32)
        w = tl.load(value, mask=kept, other=0.0)
        if ONE_TOKEN:
            one = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            of_one += tl.sum(w.to(tl.float32) * one[None, :], axis=1)
        else:
            some = tl.load(
                x + token[None, :].to(tl.int64) * columns + column[:, None],
                mask=(token < tokens)[None, :] & (column < columns)[:, None],
                other=0.0,
            )
            if UPCAST:
                total = tl.dot(w.to(tl.float32), some.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(w, some, total, input_precision="ieee")
    offset = tl.zeros((ROWS,), dtype=tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    if ONE_TOKEN:
        tl.store(output + row, (of_one + offset).to(output.dtype.element_ty), mask=row < rows)
    else:
        tl.store(
            output + token[None, :].to(tl.int64) * rows + row[:, None],
            (total + offset[:, None]).to(output.dtype.element_ty),
            mask=(token < tokens)[None, :] & (row < rows)[:, None],
        )


def multiply_triton(x: Tensor, bias: Tensor | None, compressed: Tensor, bitmask: Tensor) -> Tensor:
    """x·Wᵀ + b from the packed W, summed in float32.

    Args:
        x: (tokens, in_features), contiguous as all that follows, and of one dtype.
        bias: (out_features,).
        compressed: (out_features, in_features / 2).
        bitmask: uint8 (out_features, ceil(in_features / 8)).

    Returns:
        (tokens, out_features).
    """
    (tokens, columns), rows = x.shape, compressed.shape[0]
    output = x.new_empty(tokens, rows)
    if output.numel():
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(tokens, _TOKENS))
        with torch.cuda.device_of(x):
            _packed_kernel[grid](
                x, compressed, bitmask, x if bias is None else bias, output, tokens, rows, columns, bitmask.shape[1],
                HAS_BIAS=bias is not None, ONE_TOKEN=tokens == 1,
                UPCAST=is_interpreted(),  # whose product of bfloat16 multiplies their bits
                ROWS=_ROWS, COLUMNS=_COLUMNS, TOKENS=_TOKENS,
            )  # fmt: skip
    return output
