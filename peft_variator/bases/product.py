"""The product with a packed weight, and its gradient: unpack, multiply, forget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..workspace import WORKSPACE
from .layout import unpack


__all__ = ["as_autocast", "packed_linear"]


def as_autocast(input: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """Input, bias and dtype of the product as autocast would have them for `F.linear`, which leaves float64 alone."""
    device_type = input.device.type
    if not torch.is_autocast_enabled(device_type):
        return input, bias, dtype
    target = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(target)

    return cast(input), None if bias is None else cast(bias), dtype if dtype == torch.float64 else target


def packed_linear(
    input: Tensor,
    bias: Tensor | None,
    compressed: Tensor,
    bitmask: Tensor,
    dtype: torch.dtype,
    sparse: Tensor | None = None,
) -> Tensor:
    """x·Wᵀ + b for a packed W.

    Args:
        input: (..., in_features), of `dtype`.
        bias: (out_features,), of `dtype`.
        compressed: (out_features, in_features / 2).
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        dtype: what W is cast to, before it is unpacked.
        sparse: W as a semi-structured tensor of `torch.sparse`; the forward uses it, the backward unpacks.

    Returns:
        (..., out_features).
    """
    if sparse is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _PackedLinear.apply(input, bias, compressed, bitmask, dtype, sparse)
    return _forward(input, bias, compressed, bitmask, dtype)


def _unpacked(compressed: Tensor, bitmask: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """W (out_features, in_features) in the workspace."""
    compressed = compressed.to(dtype)
    return unpack(compressed, bitmask, in_features, out=WORKSPACE.take((compressed.shape[0], in_features), compressed))


def _forward(input: Tensor, bias: Tensor | None, compressed: Tensor, bitmask: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(input, _unpacked(compressed, bitmask, 2 * compressed.shape[1], dtype), bias)


def _input_gradient(grad: Tensor, compressed: Tensor, bitmask: Tensor, dtype: torch.dtype) -> Tensor:
    """g·W, (..., out_features) -> (..., in_features)."""
    weight = _unpacked(compressed, bitmask, 2 * compressed.shape[1], dtype)
    return grad.reshape(-1, grad.shape[-1]).mm(weight).view(*grad.shape[:-1], weight.shape[1])


# Opaque to torch.compile: traced through, its partitioner would see the same unpacked weight in forward and backward
# and keep it in between.
_forward_op = torch.library.custom_op("peft_variator::packed_linear", _forward, mutates_args=())
_input_gradient_op = torch.library.custom_op(
    "peft_variator::packed_linear_input_gradient", _input_gradient, mutates_args=()
)


@_forward_op.register_fake
def _(input, bias, compressed, bitmask, dtype):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], compressed.shape[0])


@_input_gradient_op.register_fake
def _(grad, compressed, bitmask, dtype):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], 2 * compressed.shape[1])


class _PackedLinear(torch.autograd.Function):
    """Keeps the packed tensors for the backward, which are kept anyway, and unpacks again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        compressed: Tensor,
        bitmask: Tensor,
        dtype: torch.dtype,
        sparse: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(compressed, bitmask)
        ctx.dtype = dtype
        if sparse is not None:
            return F.linear(input, sparse, bias)
        forward = _forward_op if torch.compiler.is_compiling() else _forward
        return forward(input, bias, compressed, bitmask, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient = _input_gradient_op if torch.compiler.is_compiling() else _input_gradient
        needs_input, needs_bias = ctx.needs_input_grad[:2]
        compressed, bitmask = ctx.saved_tensors
        grad_input = input_gradient(grad, compressed, bitmask, ctx.dtype) if needs_input else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if needs_bias else None
        return grad_input, grad_bias, None, None, None, None
