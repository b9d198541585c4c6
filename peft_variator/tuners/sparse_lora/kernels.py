"""What the forward and the backward of a masked linear product compute, as plain functions and as operators.

Arguments, the same throughout, flat because operators of compiled graphs take no structures:

- `a`, `b`, `scales`: A (rank, in), B (out, rank) and s of each adapter;
- `layout`, `base`: name of the `WeightLayout` of the base weight W, and the frozen tensors W is made of;
- `packed_mask`: the mask M, uint8 (out, ceil(in / 8)), or None to read it from W.

All products run in one dtype, that of x or of its gradient, whatever autocast says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...workspace import WORKSPACE
from .effective import mask_, masked_sum, side_by_side
from .layouts import get_layout


__all__ = ["backward", "backward_op", "forward", "forward_op", "update_gradients"]


def update_gradients(grad_weight: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float]) -> list[Tensor]:
    """Gradients of every A, then of every B, from that of the masked sum, (out, in), with the mask applied."""
    scaled_a, all_b = side_by_side(a, b, scales, grad_weight.dtype)
    ranks = [matrix.shape[0] for matrix in a]
    grad_a = (all_b.t() @ grad_weight).split(ranks)
    grad_b = (grad_weight @ scaled_a.t()).split(ranks, dim=1)
    scaled = [grad * scale for grad, scale in zip(grad_a, scales, strict=True)]
    return [grad.to(matrix.dtype, copy=True) for grad, matrix in zip([*scaled, *grad_b], [*a, *b], strict=True)]


def forward(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    bias: Tensor | None,
    packed_mask: Tensor | None,
    layout: str,
    base: list[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y (tokens, out) of x (tokens, in) and, where `keep` asks for it, the effective weight, else an empty tensor."""
    shape = get_layout(layout).shape(base)
    with torch.autocast(x.device.type, enabled=False):
        out = x.new_empty(shape) if keep else WORKSPACE.take(shape, x)
        weight = masked_sum(a, b, scales, packed_mask, layout, base, out)
        return F.linear(x, weight, bias), weight if keep else x.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    packed_mask: Tensor | None,
    weight: Tensor,
    layout: str,
    base: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Gradient of x (empty unless `needs_x`), then of every A and every B (none of them if x is None).

    `grad` is the gradient of y, (tokens, out), and `weight` the effective weight if the forward kept it, else empty.
    """
    shape = get_layout(layout).shape(base)
    with torch.autocast(grad.device.type, enabled=False):
        grad_x = grad.new_empty(0)
        if needs_x:
            if not weight.numel():
                weight = masked_sum(a, b, scales, packed_mask, layout, base, WORKSPACE.take(shape, grad))
            grad_x = grad @ weight
        if x is None:
            return [grad_x]
        grad_weight = torch.mm(grad.t(), x, out=WORKSPACE.take(shape, grad))
        return [grad_x, *update_gradients(mask_(grad_weight, packed_mask, layout, base), a, b, scales)]


# For torch.compile the two are opaque operators: its partitioner would find the effective weight in forward and
# backward, compute it once and keep it in between. Called eagerly, the plain functions have less overhead.
# Their schemas are written out because PyTorch before 2.7 does not derive one from `list[Tensor]`.
forward_op = torch.library.custom_op(
    "peft_variator::masked_linear",
    forward,
    mutates_args=(),
    schema="(Tensor x, Tensor[] a, Tensor[] b, float[] scales, Tensor? bias, Tensor? packed_mask, str layout, "
    "Tensor[] base, bool keep) -> (Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "peft_variator::masked_linear_backward",
    backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor? x, Tensor[] a, Tensor[] b, float[] scales, Tensor? packed_mask, Tensor weight, "
    "str layout, Tensor[] base, bool needs_x) -> Tensor[]",
)


@forward_op.register_fake
def _forward_shapes(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    bias: Tensor | None,
    packed_mask: Tensor | None,
    layout: str,
    base: list[Tensor],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    rows, columns = b[0].shape[0], a[0].shape[1]
    return x.new_empty((x.shape[0], rows)), x.new_empty((rows, columns) if keep else 0)


@backward_op.register_fake
def _backward_shapes(
    grad: Tensor,
    x: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    packed_mask: Tensor | None,
    weight: Tensor,
    layout: str,
    base: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    grad_x = grad.new_empty((grad.shape[0], a[0].shape[1]) if needs_x else 0)
    return [grad_x] if x is None else [grad_x, *(torch.empty_like(matrix) for matrix in (*a, *b))]
