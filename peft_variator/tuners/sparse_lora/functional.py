"""The masked low-rank update y = x·((W + Σ s·B·A) ⊙ M)ᵀ + bias and its exact gradients (arXiv 2404.02424).

With the mask inside the product, the gradients of A and B need (dYᵀ·X) ⊙ M, one product of weight size more than plain
LoRA's. Dropping M there would save it and bias the gradients, so it is not done. What can be saved is memory: the
effective weight (W + Σ s·B·A) ⊙ M follows from tensors that exist anyway, and is built again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels
from .effective import mask_, masked_sum
from .layouts import get_layout


__all__ = ["effective_weight", "masked_linear"]


class _MaskedLinear(torch.autograd.Function):
    """Its last arguments are every A, every B and the base tensors: only these and x, as they are, are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed_mask: Tensor | None,
        layout: str,
        scales: list[float],
        recompute: bool,
        *tensors: Tensor,
    ) -> Tensor:
        a, b, base = _split(tensors, len(scales))
        forward = kernels.forward_op if torch.compiler.is_compiling() else kernels.forward
        keep = ctx.needs_input_grad[0] and not recompute  # only the gradient of x needs the effective weight
        y, weight = forward(x, a, b, scales, bias, packed_mask, layout, base, keep)
        trains = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if trains else None, packed_mask, weight, *tensors)
        ctx.layout, ctx.scales = layout, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, packed_mask, weight, *tensors = ctx.saved_tensors
        a, b, base = _split(tensors, len(ctx.scales))
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        backward = kernels.backward_op if torch.compiler.is_compiling() else kernels.backward
        grad_x, *grad_tensors = backward(grad, x, a, b, ctx.scales, packed_mask, weight, ctx.layout, base, needs_x)
        return (
            grad_x if needs_x else None,
            grad.sum(dim=0) if needs_bias else None,
            *(None,) * 4,
            *grad_tensors,
            *(None,) * (len(tensors) - len(grad_tensors)),
        )


def masked_linear(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Tensor | None,
    packed_mask: Tensor | None,
    layout: str,
    base: Sequence[Tensor],
    recompute: bool = True,
) -> Tensor:
    """y = x·((W + Σ s·B·A) ⊙ M)ᵀ + bias, differentiable once in x, every A and B, and the bias.

    Computes in the dtype of x, inside of autocast too, whose casts are the caller's to make.

    Args:
        x: (..., in).
        a: A of each adapter, (rank, in).
        b: B of each adapter, (out, rank).
        scales: s of each adapter.
        bias: (out,) in the dtype of x, or None.
        packed_mask: M, uint8 (out, ceil(in / 8)) as from `pack_mask`, or None to read it from the base weight.
        layout: name of the `WeightLayout` of the base weight.
        base: the frozen tensors the base weight is made of; they get no gradient.
        recompute: rebuild the effective weight in the backward. Nothing but references to the arguments is kept for
            autograd then; with False the effective weight, (out, in), is.

    Returns:
        (..., out), in the dtype of x.
    """
    # Flattened out here: autograd refuses to change a view in place that a custom function returned, as DeBERTa does.
    flat = _MaskedLinear.apply(
        x.reshape(-1, x.shape[-1]), bias, packed_mask, layout, list(scales), recompute, *a, *b, *base
    )
    return flat.view(*x.shape[:-1], b[0].shape[0])


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed_mask: Tensor | None, layout: str, scales: list[float], dtype: torch.dtype, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(packed_mask, *tensors)
        ctx.layout, ctx.scales = layout, scales
        a, b, base = _split(tensors, len(scales))
        with torch.autocast(b[0].device.type, enabled=False):
            out = b[0].new_empty(get_layout(layout).shape(base), dtype=dtype)
            return masked_sum(a, b, scales, packed_mask, layout, base, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed_mask, *tensors = ctx.saved_tensors
        a, b, base = _split(tensors, len(ctx.scales))
        with torch.autocast(grad.device.type, enabled=False):
            masked = mask_(grad.clone(), packed_mask, ctx.layout, base)
            return *(None,) * 4, *kernels.update_gradients(masked, a, b, ctx.scales), *(None,) * len(base)


def effective_weight(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    packed_mask: Tensor | None,
    layout: str,
    base: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """(W + Σ s·B·A) ⊙ M, (out, in) in `dtype`, differentiable once in every A and B. Arguments as in `masked_linear`.

    For products other than a linear one, which then keep this weight for their own backward.
    """
    return _EffectiveWeight.apply(packed_mask, layout, list(scales), dtype, *a, *b, *base)


def _split(tensors: Sequence[Tensor], adapters: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Every A, every B, and the base tensors."""
    return list(tensors[:adapters]), list(tensors[adapters : 2 * adapters]), list(tensors[2 * adapters :])
