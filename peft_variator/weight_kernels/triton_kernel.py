"""The products on a GPU, in Triton.

A program has a block of rows and walks over their columns: for each it looks up the bit of a packed weight, loads the
value where one is kept (0.5625 of the bytes of a dense weight in 16 bits), adds the block's share of B·A under the
mask where there is an update, and multiplies the block with all tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import is_interpreted


__all__ = ["multiply_triton"]

_ROWS, _COLUMNS, _TOKENS, _RANKS = 32, 128, 16, 64
"""Of a tile; tokens are as many as a product of tiles takes at least, and a rank is summed up in steps of so many."""


@triton.jit
def _few_tokens_kernel(
    x, values, places, a, b, kept_bits, bias, output, tokens, rows, columns, mask_width, rank,
    PACKED: tl.constexpr, UPDATED: tl.constexpr, MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ONE_TOKEN: tl.constexpr, UPCAST: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    of_one = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at_byte = row[:, None] * mask_width + (column // 8)[None, :]
        if PACKED:
            byte = tl.load(places + at_byte, mask=inside, other=0).to(tl.int32)
            group = byte >> ((column // 4 % 2) * 4)[None, :]
            place = (column % 4)[None, :]
            kept = inside & (((group >> place) & 1) != 0)
            # The second of the two values of a group where one is kept before this column.
            second = (group & ((1 << place) - 1) & 15) != 0
            value = values + row[:, None] * (columns // 2) + (column // 4 * 2)[None, :] + second.to(tl.int32)
            w = tl.load(value, mask=kept, other=0.0)
        else:
            w = tl.load(values + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
            kept = inside & (w != 0)  # NaN is not 0
        if UPDATED:
            if MASKED:
                bits = tl.load(kept_bits + at_byte, mask=inside, other=0).to(tl.int32)
                kept = inside & (((bits >> (column % 8)[None, :]) & 1) != 0)
            update = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for first in range(0, rank, RANK):
                k = first + tl.arange(0, RANK)
                of_a = tl.load(
                    a + k[:, None].to(tl.int64) * columns + column[None, :],
                    mask=(k < rank)[:, None] & (column < columns)[None, :],
                    other=0.0,
                )
                of_b = tl.load(
                    b + row[:, None] * rank + k[None, :], mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0
                )
                update = tl.dot(of_b, of_a, update, input_precision="ieee")
            w = tl.where(kept, w.to(tl.float32) + update, 0.0)
        if ONE_TOKEN:
            one = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            of_one += tl.sum(w.to(tl.float32) * one[None, :], axis=1)
        else:
            some = tl.load(
                x + token[None, :].to(tl.int64) * columns + column[:, None],
                mask=(token < tokens)[None, :] & (column < columns)[:, None],
                other=0.0,
            )
            if UPCAST or UPDATED:  # an updated weight is not rounded
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


def multiply_triton(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    places: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """x·Wᵀ + b of W as a `FewTokensWeight` has it, summed in float32.

    Args:
        x: (tokens, in_features), contiguous as all that follows, and of one dtype.
        bias: (out_features,).
        values: of `FewTokensWeight`, and so on.
        places: where packed values stand.
        a: A of the update.
        b: B of the update.
        kept: the mask.

    Returns:
        (tokens, out_features).
    """
    (tokens, columns), rows = x.shape, values.shape[0]
    output = x.new_empty(tokens, rows)
    rank = 0 if a is None else a.shape[0]
    if output.numel():
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(tokens, _TOKENS))
        with torch.cuda.device_of(x):
            _few_tokens_kernel[grid](
                x, values, x if places is None else places, x if a is None else a, x if b is None else b,
                x if kept is None else kept, x if bias is None else bias, output,
                tokens, rows, columns, (columns + 7) // 8, rank,
                PACKED=places is not None, UPDATED=a is not None, MASKED=kept is not None,
                HAS_BIAS=bias is not None, ONE_TOKEN=tokens == 1,
                UPCAST=is_interpreted(),  # whose product of bfloat16 multiplies their bits
                RANK=max(16, min(triton.next_power_of_2(max(rank, 1)), _RANKS)),
                ROWS=_ROWS, COLUMNS=_COLUMNS, TOKENS=_TOKENS,
            )  # fmt: skip
    return output
