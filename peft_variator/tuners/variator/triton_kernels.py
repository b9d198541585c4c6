"""A plugin's kernels in Triton: score, softmax and merge in one; expand and correction in one.

What they compute is said by the plain functions of `merging`, `scoring` and `decompression`; `fused` calls them. A
program of the first kind has one row, of the second a tile of tokens. Sums and softmax are in float32. What is loaded
becomes float32 at once, as Triton's interpreter computes with the bits of a bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import is_interpreted


__all__ = ["PROLOGUES", "expand", "merge", "merge_gradient", "sum_members"]

PROLOGUES = {"plain": 0, "difference": 1, "tanh": 2}
"""What becomes of a token's hidden layer h and its row's, g, before the last map: h, h − g, or tanh(h + g)."""


@triton.jit
def _merge_kernel(
    tokens, weight, members, rows, weights, dim, size, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SIZE)
    member = tl.load(members + row * size + slot, mask=slot < size, other=-1).to(tl.int64)
    filled = member >= 0
    score = tl.zeros((SIZE,), dtype=tl.float32)
    for start in range(0, dim, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = filled[:, None] & (at < dim)[None, :]
        x = tl.load(tokens + member[:, None] * dim + at[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)
        score += tl.sum(x * w[None, :], axis=1)
    score = tl.where(filled, score, float("-inf"))
    share = tl.exp(score - tl.max(score, axis=0))
    share = share / tl.sum(share, axis=0)
    # A token by itself is copied, whatever its score.
    share = tl.where(tl.sum(filled.to(tl.int32), axis=0) > 1, share, filled.to(tl.float32))
    tl.store(weights + row * size + slot, share, mask=slot < size)
    for start in range(0, dim, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = filled[:, None] & (at < dim)[None, :]
        x = tl.load(tokens + member[:, None] * dim + at[None, :], mask=mask, other=0.0).to(tl.float32)
        merged = tl.sum(x * share[:, None], axis=0)
        tl.store(rows + row * dim + at, merged.to(rows.dtype.element_ty), mask=at < dim)


@triton.jit
def _merge_gradient_kernel(
    grad, tokens, weight, members, row_of, weights, token_grads, score_grads, dim, size,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SIZE)
    member = tl.load(members + row * size + slot, mask=slot < size, other=-1).to(tl.int64)
    # An empty row holds a token of another one, which gets its gradient there.
    owned = (member >= 0) & (tl.load(row_of + member, mask=member >= 0, other=-1) == row)
    share = tl.load(weights + row * size + slot, mask=slot < size, other=0.0)
    along = tl.zeros((SIZE,), dtype=tl.float32)
    for start in range(0, dim, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = owned[:, None] & (at < dim)[None, :]
        x = tl.load(tokens + member[:, None] * dim + at[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row * dim + at, mask=at < dim, other=0.0).to(tl.float32)
        along += tl.sum(x * g[None, :], axis=1)
    score_grad = share * (along - tl.sum(share * along, axis=0))
    score_grad = tl.where(tl.sum(owned.to(tl.int32), axis=0) > 1, score_grad, 0.0)
    tl.store(score_grads + member, score_grad, mask=owned)
    for start in range(0, dim, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(grad + row * dim + at, mask=at < dim, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)
        x_grad = share[:, None] * g[None, :] + score_grad[:, None] * w[None, :]
        mask = owned[:, None] & (at < dim)[None, :]
        tl.store(token_grads + member[:, None] * dim + at[None, :], x_grad.to(token_grads.dtype.element_ty), mask=mask)


@triton.jit
def _sum_members_kernel(
    values, members, row_of, sums, dim, size, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SIZE)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    member = tl.load(members + row * size + slot, mask=slot < size, other=-1).to(tl.int64)
    owned = (member >= 0) & (tl.load(row_of + member, mask=member >= 0, other=-1) == row)
    mask = owned[:, None] & (at < dim)[None, :]
    x = tl.load(values + member[:, None] * dim + at[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + row * dim + at, tl.sum(x, axis=0).to(sums.dtype.element_ty), mask=at < dim)


@triton.jit
def _expand_kernel(
    rows, inner, of_rows, up, bias, row_of, is_merged, output, tokens, num_rows, dim, width,
    PROLOGUE: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    at = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    row = tl.load(row_of + token, mask=token < tokens, other=num_rows).to(tl.int64)
    merged = tl.load(is_merged + token, mask=token < tokens, other=0) != 0
    total = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        neuron = start + tl.arange(0, BLOCK_WIDTH)
        # What is not merged has no correction, not even one of NaN.
        mask = merged[:, None] & (neuron < width)[None, :]
        h = tl.load(inner + token[:, None] * width + neuron[None, :], mask=mask, other=0.0)
        if PROLOGUE != 0:
            g = tl.load(of_rows + row[:, None] * width + neuron[None, :], mask=mask, other=0.0).to(tl.float32)
            h = h.to(tl.float32)
            if PROLOGUE == 1:
                h = h - g
            else:
                x = h + g
                # Near 0 the quotient would lose all digits: there the series, as far as float32 can tell.
                t = tl.exp(-2.0 * tl.abs(x))
                far = (1.0 - t) / (1.0 + t)
                square = tl.minimum(x * x, 0.01)
                near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
                h = tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))
            h = h.to(inner.dtype.element_ty)
        v = tl.load(
            up + at[None, :].to(tl.int64) * width + neuron[:, None],
            mask=(at < dim)[None, :] & (neuron < width)[:, None],
            other=0.0,
        )
        if UPCAST:
            total = tl.dot(h.to(tl.float32), v.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(h, v, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + at, mask=at < dim, other=0.0).to(tl.float32)[None, :]
    mask = (row < num_rows)[:, None] & (at < dim)[None, :]
    total = tl.where(merged[:, None], total, 0.0)
    total += tl.load(rows + row[:, None] * dim + at[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(
        output + token[:, None] * dim + at[None, :],
        total.to(output.dtype.element_ty),
        mask=(token < tokens)[:, None] & (at < dim)[None, :],
    )


def merge(tokens: Tensor, weight: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of each row's members.

    Args:
        tokens: shape `(tokens, dim)`, contiguous.
        weight: of the score, shape `(dim,)`, of the same dtype.
        members: token numbers, −1 where there is none, int32, shape `(rows, size)`.

    Returns:
        The rows, shape `(rows, dim)`, and the weights of the members, float32, shape `(rows, size)`.
    """
    (num_rows, size), dim = members.shape, tokens.shape[1]
    rows = tokens.new_empty(num_rows, dim)
    weights = torch.empty(num_rows, size, dtype=torch.float32, device=tokens.device)
    if rows.numel():
        blocks = _row_blocks(dim, size)
        with torch.cuda.device_of(tokens):
            _merge_kernel[(num_rows,)](tokens, weight, members, rows, weights, dim, size, **blocks)
    return rows, weights


def merge_gradient(
    grad: Tensor, tokens: Tensor, weight: Tensor, members: Tensor, row_of: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `merge`: of the tokens `(tokens, dim)`, and of their scores, float32 `(tokens,)`.

    `grad` is that of the rows, contiguous; a token gets a gradient from its own row, `row_of`, alone.
    """
    (num_rows, size), dim = members.shape, tokens.shape[1]
    token_grads = torch.zeros_like(tokens)
    score_grads = torch.zeros(tokens.shape[0], dtype=torch.float32, device=tokens.device)
    if grad.numel():
        with torch.cuda.device_of(grad):
            _merge_gradient_kernel[(num_rows,)](
                grad, tokens, weight, members, row_of, weights, token_grads, score_grads, dim, size,
                **_row_blocks(dim, size),
            )  # fmt: skip
    return token_grads, score_grads


def sum_members(values: Tensor, members: Tensor, row_of: Tensor) -> Tensor:
    """The sum over the tokens of each row, `(rows, dim)`: the gradient of giving a row to its tokens."""
    (num_rows, size), dim = members.shape, values.shape[1]
    sums = values.new_empty(num_rows, dim)
    if sums.numel():
        blocks = _row_blocks(dim, size)
        grid = (num_rows, triton.cdiv(dim, blocks["BLOCK"]))
        with torch.cuda.device_of(values):
            _sum_members_kernel[grid](values, members, row_of, sums, dim, size, **blocks)
    return sums


def expand(
    rows: Tensor,
    inner: Tensor,
    of_rows: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    row_of: Tensor,
    is_merged: Tensor,
    prologue: str,
) -> Tensor:
    """What `fused.expand_rows` says, of contiguous tensors of one dtype; padding has a row that is not there."""
    (tokens, width), dim = inner.shape, up.shape[0]
    output = inner.new_empty(tokens, dim)
    if output.numel():
        blocks = {"BLOCK_TOKENS": 64, "BLOCK_DIM": 64, "BLOCK_WIDTH": 32}
        grid = (triton.cdiv(tokens, blocks["BLOCK_TOKENS"]), triton.cdiv(dim, blocks["BLOCK_DIM"]))
        with torch.cuda.device_of(inner):
            _expand_kernel[grid](
                rows, inner, inner if of_rows is None else of_rows, up, up if bias is None else bias,
                row_of, is_merged.view(torch.uint8), output, tokens, rows.shape[0], dim, width,
                PROLOGUE=PROLOGUES[prologue], HAS_BIAS=bias is not None,
                UPCAST=is_interpreted(),  # whose product of bfloat16 multiplies their bits
                **blocks,
            )  # fmt: skip
    return output


def _row_blocks(dim: int, size: int) -> dict[str, int]:
    """Sizes of a program that has a row: at most 4,096 entries at a time."""
    slots = triton.next_power_of_2(size)
    return {"SIZE": slots, "BLOCK": max(16, min(triton.next_power_of_2(dim), 4096 // slots))}
