"""Merging and expanding by Triton's kernels, with their gradients; `triton_kernels` has the kernels themselves.

The plain functions of `merging` are the reference, and run wherever `runs_triton` says no. Opaque operators stand for
the kernels in compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...triton_support import runs_triton
from .merging import Groups


__all__ = ["FUSED_WIDTH", "expand_rows", "merge_rows", "runs_fused"]

P = ParamSpec("P")
R = TypeVar("R")

FUSED_WIDTH = 256
"""The widest correction whose product is the kernel's own. A wider one should be bound by arithmetic, where the
library's product is better: an estimate, which nobody has measured."""


def runs_fused(inner: Tensor, *others: Tensor) -> bool:
    """Whether `expand_rows` takes a correction with this hidden layer, shape `(…, width)`; see `runs_triton`."""
    return inner.shape[-1] <= FUSED_WIDTH and runs_triton(inner, *others)


def merge_rows(tokens: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """The weighted mean of each group, where a token's score is its product with `weight`; see `Groups.merge`.

    Args:
        tokens: hidden states, shape `(batch, length, dim)`.
        weight: shape `(1, dim)`.
        groups: the groups.

    Returns:
        Shape `(batch, rows, dim)`. A row that no token has gives its gradient to none.
    """
    flat = tokens.flatten(0, 1).contiguous()
    rows = _Merge.apply(flat, weight.to(tokens.dtype).flatten(), groups.members_of_rows(), groups.row_of)
    return rows.view(tokens.shape[0], groups.num_rows // max(tokens.shape[0], 1), tokens.shape[2])


def expand_rows(
    rows: Tensor,
    inner: Tensor,
    of_rows: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    groups: Groups,
    prologue: str = "plain",
) -> Tensor:
    """Give each token the vector of its row and, if it shares the row, f(h, g) @ up.T + bias; padding gets zeros.

    Args:
        rows: shape `(num_rows, dim)`.
        inner: h, hidden layer of the correction for each token, shape `(batch * length, width)`.
        of_rows: g, for each row, or at least the rows that are shared, if these come first; shape `(…, width)`.
        up: shape `(dim, width)`.
        bias: shape `(dim,)`.
        groups: the groups.
        prologue: what f is: `"plain"`, h; `"difference"`, h − g; `"tanh"`, tanh(h + g).

    Returns:
        Shape `(batch * length, dim)`.
    """
    return _Expand.apply(
        rows, inner, of_rows, up, bias, groups.row_of, groups.is_merged, groups.members_of_rows(), prologue
    )


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, members: Tensor, row_of: Tensor) -> Tensor:
        rows, weights = _merge(tokens, weight, members)
        ctx.save_for_backward(tokens, weight, members, row_of, weights)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, members, row_of, weights = ctx.saved_tensors
        of_tokens, of_scores = _merge_gradient(grad.contiguous(), tokens, weight, members, row_of, weights)
        if not ctx.needs_input_grad[1]:
            return of_tokens, None, None, None
        # In single precision where half could overflow, as the score itself.
        wide = tokens.float() if tokens.dtype == torch.float16 else tokens
        of_weight = of_scores.to(wide.dtype).unsqueeze(0).mm(wide).flatten().to(weight.dtype)
        return of_tokens, of_weight, None, None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        inner: Tensor,
        of_rows: Tensor | None,
        up: Tensor,
        bias: Tensor | None,
        row_of: Tensor,
        is_merged: Tensor,
        members: Tensor,
        prologue: str,
    ) -> Tensor:
        inner, up = inner.contiguous(), up.contiguous()
        of_rows = None if of_rows is None else of_rows.contiguous()
        ctx.save_for_backward(inner, of_rows, up, row_of, is_merged, members)
        ctx.prologue = prologue
        return _expand(rows.contiguous(), inner, of_rows, up, bias, row_of, is_merged, prologue)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, of_rows, up, row_of, is_merged, members = ctx.saved_tensors
        grad = grad.contiguous()
        own = torch.where(is_merged, grad, 0)  # what reached the tokens by their corrections
        grad_inner = grad_of_rows = grad_up = grad_bias = None
        needs = ctx.needs_input_grad
        hidden = inner
        if of_rows is not None and (needs[3] or ctx.prologue == "tanh"):
            # Tokens without a correction may have a row that is not there: any will do, as it is masked.
            shared = torch.where(is_merged.flatten(), row_of, 0)
            nearest = of_rows.index_select(0, shared) if of_rows.shape[0] else torch.zeros_like(inner)
            hidden = inner - nearest if ctx.prologue == "difference" else (inner + nearest).tanh()
        if needs[1] or needs[2]:
            grad_inner = own.mm(up)
            if ctx.prologue == "tanh":
                grad_inner = torch.where(is_merged, grad_inner * (1 - hidden.square()), 0)
            if needs[2] and of_rows is not None:
                grad_of_rows = _sum_members(grad_inner, members, row_of)[: of_rows.shape[0]]
                grad_of_rows = grad_of_rows.neg() if ctx.prologue == "difference" else grad_of_rows
        if needs[3]:
            grad_up = own.t().mm(torch.where(is_merged, hidden, 0))
        if needs[4]:
            grad_bias = own.sum(dim=0)
        grad_rows = _sum_members(grad, members, row_of) if needs[0] else None
        return grad_rows, grad_inner, grad_of_rows, grad_up, grad_bias, None, None, None, None


def _kernel(fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function that calls a kernel: in compiled code an opaque operator stands for it.

    Args:
        fake: gives what the function does, as to shapes and dtypes alone.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        operator = torch.library.custom_op(f"peft_variator::{function.__name__.strip('_')}", function, mutates_args=())
        operator.register_fake(fake)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (operator if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call

    return decorate


# Triton is imported with the kernels, when the first of them is called.


@_kernel(
    lambda tokens, weight, members: (
        tokens.new_empty(members.shape[0], tokens.shape[1]),
        tokens.new_empty(members.shape, dtype=torch.float32),
    )
)
def _merge(tokens: Tensor, weight: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    from .triton_kernels import merge

    return merge(tokens, weight, members)


@_kernel(
    lambda grad, tokens, weight, members, row_of, weights: (
        torch.empty_like(tokens),
        tokens.new_empty(tokens.shape[0], dtype=torch.float32),
    )
)
def _merge_gradient(
    grad: Tensor, tokens: Tensor, weight: Tensor, members: Tensor, row_of: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    from .triton_kernels import merge_gradient

    return merge_gradient(grad, tokens, weight, members, row_of, weights)


@_kernel(lambda values, members, row_of: values.new_empty(members.shape[0], values.shape[1]))
def _sum_members(values: Tensor, members: Tensor, row_of: Tensor) -> Tensor:
    from .triton_kernels import sum_members

    return sum_members(values, members, row_of)


@_kernel(
    lambda rows, inner, of_rows, up, bias, row_of, is_merged, prologue: inner.new_empty(inner.shape[0], up.shape[0])
)
def _expand(
    rows: Tensor,
    inner: Tensor,
    of_rows: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    row_of: Tensor,
    is_merged: Tensor,
    prologue: str,
) -> Tensor:
    from .triton_kernels import expand

    return expand(rows, inner, of_rows, up, bias, row_of, is_merged, prologue)
