"""The masked low-rank update y = x·((W + Σ s·B·A) ⊙ M)ᵀ + bias, its gradients, and merging it (arXiv 2404.02424).

With the mask inside the product, the gradients of A and B need (dYᵀ·X) ⊙ M, one product of weight size more than plain
LoRA's. Dropping M there would save it and bias the gradients, so it is not done. What can be saved is memory: the
effective weight (W + Σ s·B·A) ⊙ M follows from tensors that exist anyway, and is built again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ...bitmask import row_blocks, unpack_mask
from ...weight_kernels.masked_weight import can_sum, sum_gradients, sum_weight
from ...weight_kernels.product import MIN_WEIGHTS, FewTokensWeight, is_faster, is_few, multiply
from .base_weight import WORKSPACE, get_layout


__all__ = ["MaskedWeight", "effective_weight", "masked_linear", "merge_update", "sum_updates"]

# Weights handled at a time. The temporaries, 4 bytes a weight, then stay in the cache of a CPU's core; on GPUs, where
# every launch costs, their memory is bounded.
_BLOCK_ON_CPUS, _BLOCK_ELSEWHERE = 1 << 19, 1 << 24


class MaskedWeight(NamedTuple):
    """The tensors that an effective weight (W + Σ s·B·A) ⊙ M, (out, in), is made of.

    Args:
        a: A of each adapter, (rank, in).
        b: B of each adapter, (out, rank).
        scales: s of each adapter.
        packed_mask: M, uint8 (out, ceil(in / 8)) as from `pack_mask`, or None to read it from the base weight.
        layout: name of the `WeightLayout` of the base weight W; compiled graphs know it by that.
        base: the frozen tensors W is made of; they get no gradient.
    """

    a: list[Tensor]
    b: list[Tensor]
    scales: list[float]
    packed_mask: Tensor | None
    layout: str
    base: list[Tensor]

    def shape(self) -> torch.Size:
        """(out, in)."""
        return get_layout(self.layout).shape(self.base)

    def kept(self) -> Tensor:
        """The mask M, bool (out, in), True where the weight was not pruned."""
        if self.packed_mask is None:
            return get_layout(self.layout).kept(self.base)
        return unpack_mask(self.packed_mask, columns=self.shape()[1])

    def row_blocks(self) -> Iterator[tuple[slice, MaskedWeight]]:
        """Slices that cover the rows, each with the mask and the base weight of these rows, and all of A and B."""
        layout = get_layout(self.layout)
        rows, columns = self.shape()
        size = _BLOCK_ON_CPUS if self.base[0].device.type == "cpu" else _BLOCK_ELSEWHERE
        blocks = row_blocks(rows, columns, size)
        if layout.rows is None or len(blocks) <= 1:
            yield slice(0, rows), self
            return
        for block in blocks:
            mask = None if self.packed_mask is None else self.packed_mask[block]
            yield block, self._replace(packed_mask=mask, base=layout.rows(self.base, block))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s·A (Σ rank, in) and B (out, Σ rank) of all adapters: their product is Σ s·B·A."""
        scaled = [
            matrix.to(torch.promote_types(matrix.dtype, dtype)) * scale
            for matrix, scale in zip(self.a, self.scales, strict=True)
        ]
        return torch.cat(scaled).to(dtype), torch.cat(self.b, dim=1).to(dtype)

    def effective(self, out: Tensor) -> Tensor:
        """Put the effective weight into `out`, (out, in), and return it.

        The sum is made in float32 or better and rounded once, as in merging, a block of rows at a time.
        """
        stored = self._stored_for(out)
        if stored is not None:
            return sum_weight(stored, out)
        wide = torch.promote_types(out.dtype, torch.float32)
        scaled_a, all_b = self.factors(wide)
        for rows, block in self.row_blocks():
            weight, target = get_layout(block.layout).weight(block.base).to(wide), out[rows]
            total = torch.addmm(weight, all_b[rows], scaled_a, out=target if out.dtype == wide else None)
            # A product and not a masked_fill, which is several times slower on CPUs. The -0.0 that it leaves are of no
            # consequence here; merging, which stores the zeros, makes them +0.0.
            total.mul_(block.kept().to(wide))
            if total is not target:
                target.copy_(total)
        return out

    def few_tokens(self) -> FewTokensWeight | None:
        """What the kernels read, from what A, B and W are now; `None` where they can't."""
        read = get_layout(self.layout).few_tokens
        if read is None:
            return None
        a, b = self.factors(torch.float32)
        return read(self.base)._replace(a=a, b=b, kept=self.packed_mask)

    def _stored_for(self, matrix: Tensor) -> FewTokensWeight | None:
        """What the kernels of whole weights read, where they take it and the matrix, (out, in)."""
        # the adapters' factors are put together for them, which a small layer is spared
        stored = self.few_tokens() if matrix.is_cpu and matrix.numel() >= MIN_WEIGHTS else None
        return stored if stored is not None and can_sum(stored, matrix) else None

    def gradients(self, grad_weight: Tensor) -> list[Tensor]:
        """Gradients of every A, then of every B, from that of the sum, (out, in), which the mask may be applied to."""
        ranks = [matrix.shape[0] for matrix in self.a]
        stored = self._stored_for(grad_weight)
        if stored is not None:
            of_a, of_b = sum_gradients(stored, grad_weight)
        else:
            for rows, block in self.row_blocks():
                grad_weight[rows].mul_(block.kept().to(grad_weight.dtype))
            scaled_a, all_b = self.factors(grad_weight.dtype)
            of_a, of_b = all_b.t() @ grad_weight, grad_weight @ scaled_a.t()
        grad_a, grad_b = of_a.split(ranks), of_b.split(ranks, dim=1)
        scaled = [grad * scale for grad, scale in zip(grad_a, self.scales, strict=True)]
        factors = [*self.a, *self.b]
        return [grad.to(matrix.dtype, copy=True) for grad, matrix in zip([*scaled, *grad_b], factors, strict=True)]


def _forward(x: Tensor, weight: MaskedWeight, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """y (tokens, out) of x (tokens, in) and, where `keep` asks for it, the effective weight, else an empty tensor."""
    # all products run in one dtype, that of x, whatever autocast says
    with torch.autocast(x.device.type, enabled=False):
        if keep:
            effective = weight.effective(x.new_empty(weight.shape()))
            return F.linear(x, effective, bias), effective

        def rebuilt() -> Tensor:
            return F.linear(x, weight.effective(WORKSPACE.take(weight.shape(), x)), bias)

        stored = weight.few_tokens() if is_few(x, weight.shape().numel()) else None
        if stored is not None and is_faster(x, bias, stored, rebuilt):
            return multiply(x, bias, stored), x.new_empty(0)
        return rebuilt(), x.new_empty(0)


def _backward(grad: Tensor, x: Tensor | None, weight: MaskedWeight, effective: Tensor, needs_x: bool) -> list[Tensor]:
    """Gradient of x (empty unless `needs_x`), then of every A and every B (none of them if x is None).

    `grad` is the gradient of y, (tokens, out), and `effective` the effective weight if the forward kept it, else
    empty.
    """
    with torch.autocast(grad.device.type, enabled=False):
        grad_x = grad.new_empty(0)
        if needs_x:
            if not effective.numel():
                effective = weight.effective(WORKSPACE.take(weight.shape(), grad))
            grad_x = grad @ effective
        if x is None:
            return [grad_x]
        grad_weight = torch.mm(grad.t(), x, out=WORKSPACE.take(weight.shape(), grad))
        return [grad_x, *weight.gradients(grad_weight)]


# For torch.compile the two are opaque operators: its partitioner would find the effective weight in forward and
# backward, compute it once and keep it in between. Called eagerly, the plain functions have less overhead.
# Operators take no structures, so the fields of `MaskedWeight` are flat here.
@torch.library.custom_op("peft_variator::masked_linear", mutates_args=())
def _forward_op(
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
    return _forward(x, MaskedWeight(a, b, scales, packed_mask, layout, base), bias, keep)


_forward_op.register_fake(
    lambda x, a, b, scales, bias, packed_mask, layout, base, keep: (
        x.new_empty(x.shape[0], b[0].shape[0]),
        x.new_empty((b[0].shape[0], a[0].shape[1]) if keep else 0),
    )
)


@torch.library.custom_op("peft_variator::masked_linear_backward", mutates_args=())
def _backward_op(
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
    return _backward(grad, x, MaskedWeight(a, b, scales, packed_mask, layout, base), weight, needs_x)


_backward_op.register_fake(
    lambda grad, x, a, b, scales, packed_mask, weight, layout, base, needs_x: [
        grad.new_empty((grad.shape[0], a[0].shape[1]) if needs_x else 0),
        *(torch.empty_like(matrix) for matrix in (*a, *b) if x is not None),
    ]
)


def _gather(layout: str, scales: list[float], packed_mask: Tensor | None, tensors: Sequence[Tensor]) -> MaskedWeight:
    """The record again from every A, every B and the base tensors, which autograd has to see one by one."""
    count = len(scales)
    a, b, base = list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :])
    return MaskedWeight(a, b, scales, packed_mask, layout, base)


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
        identity: int,
        *tensors: Tensor,
    ) -> Tensor:
        weight = _gather(layout, scales, packed_mask, tensors)
        keep = ctx.needs_input_grad[0] and not recompute  # only the gradient of x needs the effective weight
        if torch.compiler.is_compiling():
            a, b, *_, base = weight
            y, effective = _forward_op(x, a, b, scales, bias, packed_mask, layout, base, keep)
        else:
            y, effective = _forward(x, weight, bias, keep)
        trains = any(ctx.needs_input_grad[7:])
        ctx.save_for_backward(x if trains else None, packed_mask, effective, x.new_empty(0, identity), *tensors)
        ctx.layout, ctx.scales = layout, scales
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, packed_mask, effective, _, *tensors = ctx.saved_tensors
        weight = _gather(ctx.layout, ctx.scales, packed_mask, tensors)
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        if torch.compiler.is_compiling():
            a, b, *_, base = weight
            grads = _backward_op(grad, x, a, b, ctx.scales, packed_mask, effective, ctx.layout, base, needs_x)
        else:
            grads = _backward(grad, x, weight, effective, needs_x)
        grad_x, *grad_tensors = grads
        return (
            grad_x if needs_x else None,
            grad.sum(dim=0) if needs_bias else None,
            *(None,) * 5,
            *grad_tensors,
            *(None,) * (len(tensors) - len(grad_tensors)),
        )


def masked_linear(
    x: Tensor, weight: MaskedWeight, bias: Tensor | None, recompute: bool = True, identity: int = 0
) -> Tensor:
    """y = x·((W + Σ s·B·A) ⊙ M)ᵀ + bias, differentiable once in x, every A and B, and the bias.

    Computes in the dtype of x, inside of autocast too, whose casts are the caller's to make.

    Args:
        x: (..., in).
        weight: what the effective weight is made of.
        bias: (out,) in the dtype of x, or None.
        recompute: rebuild the effective weight in the backward. Nothing but references to the arguments is kept for
            autograd then; with False the effective weight, (out, in), is.
        identity: a number that says which adapters these are. `torch.utils.checkpoint` raises if the forward that it
            repeats in the backward saves tensors of other shapes, and an empty tensor of this many columns is saved.

    Returns:
        (..., out), in the dtype of x.
    """
    a, b, scales, packed_mask, layout, base = weight
    # Flattened out here: autograd refuses to change a view in place that a custom function returned, as DeBERTa does.
    flat = x.reshape(-1, x.shape[-1])
    if torch.jit.is_tracing():  # which records operators, and no function of ours
        y, _ = _forward_op(flat, a, b, scales, bias, packed_mask, layout, base, False)
        return y.view(*x.shape[:-1], b[0].shape[0])
    y = _MaskedLinear.apply(flat, bias, packed_mask, layout, scales, recompute, identity, *a, *b, *base)
    return y.view(*x.shape[:-1], b[0].shape[0])


def _effective(weight: MaskedWeight, dtype: torch.dtype) -> Tensor:
    like = weight.a[0]
    with torch.autocast(like.device.type, enabled=False):
        return weight.effective(like.new_empty(weight.shape(), dtype=dtype))


@torch.library.custom_op("peft_variator::effective_weight", mutates_args=())
def _effective_op(
    a: list[Tensor],
    b: list[Tensor],
    scales: list[float],
    packed_mask: Tensor | None,
    layout: str,
    base: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    return _effective(MaskedWeight(a, b, scales, packed_mask, layout, base), dtype)


class _EffectiveWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packed_mask: Tensor | None,
        layout: str,
        scales: list[float],
        dtype: torch.dtype,
        identity: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(packed_mask, tensors[0].new_empty(0, identity), *tensors)
        ctx.layout, ctx.scales = layout, scales
        return _effective(_gather(layout, scales, packed_mask, tensors), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed_mask, _, *tensors = ctx.saved_tensors
        weight = _gather(ctx.layout, ctx.scales, packed_mask, tensors)
        with torch.autocast(grad.device.type, enabled=False):
            grads = weight.gradients(grad.clone())
        return *(None,) * 5, *grads, *(None,) * len(weight.base)


def effective_weight(weight: MaskedWeight, dtype: torch.dtype, identity: int = 0) -> Tensor:
    """(W + Σ s·B·A) ⊙ M, (out, in) in `dtype`, differentiable once in every A and B.

    For products other than a linear one, which then keep this weight for their own backward. `identity` as in
    `masked_linear`.
    """
    a, b, scales, packed_mask, layout, base = weight
    if torch.jit.is_tracing():  # see masked_linear
        return _effective_op(a, b, scales, packed_mask, layout, base, dtype)
    return _EffectiveWeight.apply(packed_mask, layout, scales, dtype, identity, *a, *b, *base)


@torch.no_grad()
def sum_updates(a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """ΔW = Σ s·B·A, (out, in), in float32, or in `dtype` where that is wider.

    Args:
        a: A of each adapter, (rank, in).
        b: B of each adapter, (out, rank).
        scales: s of each adapter.
        dtype: that of the weight to update.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    total = b[0].new_zeros(b[0].shape[0], a[0].shape[1], dtype=dtype)
    for one_a, one_b, scale in zip(a, b, scales, strict=True):
        total.addmm_(one_b.to(dtype), one_a.to(dtype), alpha=scale)
    return total


def merge_update(weight: Tensor, update: Tensor, kept: Tensor) -> Tensor:
    """(W + ΔW) ⊙ M, summed in float32 or better and rounded once.

    The zeros of the result are the zeros of the mask, all of them +0.0: kernels for n:m sparsity have been seen to
    return garbage for -0.0. A weight that the update happens to cancel would be one zero more, and would look pruned
    from then on; it becomes the smallest positive number of its dtype instead. So merging -ΔW brings back every zero
    of W exactly, and the other weights to the rounding of their dtype.

    Args:
        weight: W, (out, in).
        update: ΔW, (out, in), in float32 or float64.
        kept: M, bool (out, in).

    Returns:
        (out, in), in the dtype of `weight`.
    """
    merged = (weight.to(update.dtype) + update).to(weight.dtype)
    merged = merged.masked_fill((merged == 0) & (weight != 0), _smallest(weight.dtype))
    return torch.where(kept & (merged != 0), merged, 0.0)


def _smallest(dtype: torch.dtype) -> float:
    """Smallest positive number that stays one; subnormals may be flushed, except float16's, computed in float32."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
