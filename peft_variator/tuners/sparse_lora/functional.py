"""The masked low-rank update y = x·((W + B·A) ⊙ M)ᵀ + b and its exact gradients (arXiv 2404.02424, section 3.3).

With the mask inside the product, the gradients of A and B need (dYᵀ·X) ⊙ M, one product of weight size more than plain
LoRA's. Dropping M there would save it and bias the gradients, so it is not done. What can be saved is memory: the
effective weight (W + B·A) ⊙ M follows from tensors that are kept anyway, and is built again in the backward.

Names: W is described by `layout` and `base`, its frozen tensors (see `layouts.py`); M is `packed_mask` where one is
stored, else read from W; `a` is s·A, (r, in), with LoRA's scale folded in by the caller, and `b` is B, (out, r). All
products run in the dtype of `a`, which is the compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .layouts import get_layout
from .masks import unpack_mask


__all__ = ["effective_weight", "kept_weights", "masked_linear"]


def kept_weights(packed_mask: torch.Tensor | None, layout: str, base: list[torch.Tensor]) -> torch.Tensor:
    """The mask M, bool (out, in), True where the weight was not pruned."""
    if packed_mask is None:
        return get_layout(layout).kept(base)
    return unpack_mask(packed_mask, columns=get_layout(layout).shape(base)[1])


def _masked_sum(
    a: torch.Tensor, b: torch.Tensor, kept: torch.Tensor, layout: str, base: list[torch.Tensor]
) -> torch.Tensor:
    """(W + B·A) ⊙ M, (out, in)."""
    # A product and not a masked_fill, which is several times slower on CPUs. The -0.0 that it leaves are of no
    # consequence here; merging, which stores the zeros, makes them +0.0.
    return torch.addmm(get_layout(layout).weight(base).to(a.dtype), b, a).mul_(kept)


def _forward(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor | None,
    layout: str,
    base: list[torch.Tensor],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (..., out) and, where `keep` asks for it, the effective weight (out, in), else an empty tensor."""
    with torch.autocast(x.device.type, enabled=False):
        weight = _masked_sum(a, b, kept_weights(packed_mask, layout, base), layout, base)
        return F.linear(x, weight, bias), weight if keep else x.new_empty(0)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    packed_mask: torch.Tensor | None,
    weight: torch.Tensor,
    layout: str,
    base: list[torch.Tensor],
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, A and B, empty where not needed: x's unless `needs_x`, those of A and B if x is None."""
    grad_x, grad_a, grad_b = (grad.new_empty(0) for _ in range(3))
    with torch.autocast(grad.device.type, enabled=False):
        kept = kept_weights(packed_mask, layout, base)
        if needs_x:
            grad_x = grad @ (weight if weight.numel() else _masked_sum(a, b, kept, layout, base))
        if x is not None:
            grad_weight = (grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).mul_(kept)
            grad_a, grad_b = b.t() @ grad_weight, grad_weight @ a.t()
    return grad_x, grad_a, grad_b


# For torch.compile the two are opaque operators: its partitioner would find the effective weight in forward and
# backward, compute it once and keep it in between. Called eagerly, the plain functions have less overhead.
_forward_op = torch.library.custom_op("peft_variator::masked_linear", _forward, mutates_args=())
_backward_op = torch.library.custom_op("peft_variator::masked_linear_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _forward_shapes(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor | None,
    layout: str,
    base: list[torch.Tensor],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((*x.shape[:-1], b.shape[0])), x.new_empty((b.shape[0], a.shape[1]) if keep else 0)


@_backward_op.register_fake
def _backward_shapes(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    packed_mask: torch.Tensor | None,
    weight: torch.Tensor,
    layout: str,
    base: list[torch.Tensor],
    needs_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = grad.new_empty((*grad.shape[:-1], a.shape[1]) if needs_x else 0)
    return grad_x, grad.new_empty(0 if x is None else a.shape), grad.new_empty(0 if x is None else b.shape)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        packed_mask: torch.Tensor | None,
        layout: str,
        recompute: bool,
        *base: torch.Tensor,
    ) -> torch.Tensor:
        forward = _forward_op if torch.compiler.is_compiling() else _forward
        y, weight = forward(x, a, b, bias, packed_mask, layout, list(base), not recompute)
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if trains else None, a, b, packed_mask, weight, *base)
        ctx.layout = layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, packed_mask, weight, *base = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_bias = ctx.needs_input_grad[:4]
        backward = _backward_op if torch.compiler.is_compiling() else _backward
        grad_x, grad_a, grad_b = backward(grad, x, a, b, packed_mask, weight, ctx.layout, base, needs_x)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if needs_bias else None
        gradients = (grad_x if needs_x else None, grad_a if needs_a else None, grad_b if needs_b else None, grad_bias)
        return gradients + (None,) * (3 + len(base))


def masked_linear(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    packed_mask: torch.Tensor | None,
    layout: str,
    base: list[torch.Tensor],
    recompute: bool = True,
) -> torch.Tensor:
    """y = x·((W + B·A) ⊙ M)ᵀ + bias.

    Differentiable once, in `x`, `a`, `b` and `bias`. Runs the same inside and outside of autocast, whose casts are the
    caller's to make.

    Args:
        x: (..., in).
        a: s·A, (r, in).
        b: B, (out, r).
        bias: (out,) or None.
        packed_mask: M, uint8 (out, ceil(in / 8)) as from `pack_mask`, or None to read it from the base weight.
        layout: name of the `WeightLayout` of the base weight.
        base: the frozen tensors the base weight is made of; they get no gradient.
        recompute: rebuild the effective weight in the backward. Nothing of size (out, in) is kept for autograd then;
            with False the effective weight is.

    Returns:
        (..., out), in the dtype of `x`.
    """
    # Flattened out here: autograd refuses to change a view in place that a custom function returned, as DeBERTa does.
    flat = _MaskedLinear.apply(x.reshape(-1, x.shape[-1]), a, b, bias, packed_mask, layout, recompute, *base)
    return flat.view(*x.shape[:-1], b.shape[0])


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        packed_mask: torch.Tensor | None,
        layout: str,
        *base: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(a, b, packed_mask, *base)
        ctx.layout = layout
        with torch.autocast(a.device.type, enabled=False):
            return _masked_sum(a, b, kept_weights(packed_mask, layout, list(base)), layout, list(base))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, packed_mask, *base = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad * kept_weights(packed_mask, ctx.layout, base)
            return b.t() @ grad, grad @ a.t(), *((None,) * (2 + len(base)))


def effective_weight(
    a: torch.Tensor, b: torch.Tensor, packed_mask: torch.Tensor | None, layout: str, base: list[torch.Tensor]
) -> torch.Tensor:
    """(W + B·A) ⊙ M, (out, in), differentiable once in `a` and `b`. Arguments as in `masked_linear`.

    For products other than a linear one, which then keep this weight for their own backward.
    """
    return _EffectiveWeight.apply(a, b, packed_mask, layout, *base)
