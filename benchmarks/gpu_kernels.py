"""Each Triton kernel by its name: how far it is from the plain functions in float64, and how long both take.

Stage "kernels" of `gpu.py` runs these rows, on the CPU by Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_variator.bases.packing import pack, unpack
from peft_variator.tuners.variator.fused import expand_rows, merge_rows
from peft_variator.tuners.variator.merging import Block, SharedGroups
from peft_variator.weight_kernels.product import FewTokensWeight, multiply


__all__ = ["OF_SUMS", "ROUNDINGS", "KernelCase", "kernel_cases"]

ROUNDINGS, OF_SUMS = 2, 1e-5
"""How far a kernel may be off, of 1 plus the largest value of the reference: so often the epsilon of its dtype, and
what sums in float32 lose."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel and what it is held against.

    Args:
        name: of the kernel, with its shapes.
        kernel: computes with it; a tensor for each result.
        plain: for a dtype, what computes the same by the plain functions in it.
        dtype: of what the kernel is given.
    """

    name: str
    kernel: Callable[[], list[Tensor]]
    plain: Callable[[torch.dtype], Callable[[], list[Tensor]]]
    dtype: torch.dtype

    def compare(self) -> dict[str, str | float | bool]:
        """The largest difference from the plain functions in float64, for the result where it is worst."""
        found, exact = self.kernel(), self.plain(torch.float64)()
        if [one.shape for one in found] != [other.shape for other in exact]:
            raise ValueError(
                f"{self.name}: {[tuple(one.shape) for one in found]} are not the shapes of the reference."
            )
        share = ROUNDINGS * torch.finfo(self.dtype).eps + OF_SUMS
        allowed = [share * (1 + float(other.abs().max())) for other in exact]
        off = [float((one.double() - other).abs().max()) for one, other in zip(found, exact, strict=True)]
        # NaN is worse than anything, and is never within what is allowed.
        shares = [one / most if one == one else float("inf") for one, most in zip(off, allowed, strict=True)]
        worst = shares.index(max(shares))
        return {
            "name": self.name,
            "difference": off[worst],
            "allowed": allowed[worst],
            "passed": off[worst] <= allowed[worst],
        }


def kernel_cases(device: torch.device, dry: bool) -> Iterator[Callable[[], KernelCase]]:
    """Every kernel, each to be made by itself: what breaks one takes no other with it.

    Args:
        device: where.
        dry: shapes for Triton's interpreter, which takes a tenth of a second for a program.
    """
    for dtype in (torch.bfloat16,) if dry else (torch.bfloat16, torch.float16, torch.float32):
        briefly = dry or dtype != torch.bfloat16
        for backward in (False, True):
            yield partial(_merge, device, dtype, dry, backward)
            for prologue in ("plain",) if briefly else ("plain", "difference", "tanh"):
                yield partial(_expand, device, dtype, dry, backward, prologue)
        for tokens in (1, 5) if briefly else (1, 2, 4, 8, 16):
            yield partial(_product, device, dtype, dry, tokens, "packed", 0)
        masked = [("packed", 1, 8), ("dense", 1, 70)]
        if not briefly:
            masked += [("packed", 16, 8), ("dense", 16, 8), ("packed", 1, 300), ("packed", 16, 300)]
        for form, tokens, rank in masked:
            yield partial(_product, device, dtype, dry, tokens, form, rank)


def _groups(device: torch.device, dry: bool) -> tuple[SharedGroups, int, int]:
    """A token by itself and groups of four and of three, as often as a batch has them; the batch and its length."""
    batch, groups = (1, 2) if dry else (8, 127)
    blocks = [Block(0, (1, 1)), Block(1, (groups, 4)), Block(1 + 4 * groups, (1, 3))]
    return SharedGroups.of(blocks, batch, device), batch, 4 + 4 * groups


def _name(what: str, backward: bool, dtype: torch.dtype, shapes: str) -> str:
    return f"{what} {'backward' if backward else 'forward'}, {str(dtype).removeprefix('torch.')}, {shapes}"


def _differentiated(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, backward: bool, dtype: torch.dtype
) -> Callable[[], list[Tensor]]:
    """The forward alone, or the gradients of the inputs alone, by one forward that is kept."""
    inputs = [each.detach().to(dtype).requires_grad_(backward) for each in inputs]
    if not backward:
        return lambda: [function(*inputs)]
    output = function(*inputs)
    return lambda: list(torch.autograd.grad(output, inputs, upstream.to(dtype), retain_graph=True))


def _merge(device: torch.device, dtype: torch.dtype, dry: bool, backward: bool) -> KernelCase:
    groups, batch, length = _groups(device, dry)
    dim = 40 if dry else 2048
    inputs = [torch.randn(batch, length, dim), torch.randn(1, dim) / dim**0.5]
    inputs = [each.to(device, dtype) for each in inputs]
    upstream = torch.randn(batch, groups.num_rows // batch, dim).to(device, dtype)

    def plain(tokens: Tensor, weight: Tensor) -> Tensor:
        return groups.merge(tokens, lambda part: part.scores(tokens @ weight.t()))

    def kernel(tokens: Tensor, weight: Tensor) -> Tensor:
        return merge_rows(tokens, weight, groups)

    return KernelCase(
        _name("merge", backward, dtype, f"{batch}×{length}×{dim}"),
        _differentiated(kernel, inputs, upstream, backward, dtype),
        lambda wide: _differentiated(plain, inputs, upstream, backward, wide),
        dtype,
    )


def _expand(device: torch.device, dtype: torch.dtype, dry: bool, backward: bool, prologue: str) -> KernelCase:
    groups, batch, length = _groups(device, dry)
    dim, width, tokens = (40, 20, batch * length) if dry else (2048, 256, batch * length)
    shapes = [(groups.num_rows, dim), (tokens, width), (dim, width), (dim,)]
    shapes += [] if prologue == "plain" else [(groups.num_rows, width)]
    inputs = [(torch.randn(shape) / 3).to(device, dtype) for shape in shapes]
    upstream = torch.randn(tokens, dim).to(device, dtype)

    def plain(rows: Tensor, inner: Tensor, up: Tensor, bias: Tensor, of_rows: Tensor | None = None) -> Tensor:
        if of_rows is not None:
            of_tokens = groups.spread(of_rows)
            inner = inner - of_tokens if prologue == "difference" else (inner + of_tokens).tanh()
        return groups.spread(rows) + torch.where(groups.is_merged, F.linear(inner, up, bias), 0)

    def kernel(rows: Tensor, inner: Tensor, up: Tensor, bias: Tensor, of_rows: Tensor | None = None) -> Tensor:
        return expand_rows(rows, inner, of_rows, up, bias, groups, prologue)

    return KernelCase(
        _name(f"expand ({prologue})", backward, dtype, f"{tokens}×{dim}, width {width}"),
        _differentiated(kernel, inputs, upstream, backward, dtype),
        lambda wide: _differentiated(plain, inputs, upstream, backward, wide),
        dtype,
    )


def _product(device: torch.device, dtype: torch.dtype, dry: bool, tokens: int, form: str, rank: int) -> KernelCase:
    from peft_variator.weight_kernels.triton_kernel import multiply_triton

    rows, columns = (37, 140) if dry else (8192, 2048)
    dense = torch.randn(rows, columns // 4, 4, device=device)
    dense = dense.scatter_(2, torch.rand_like(dense).topk(2).indices, 0).flatten(1).to(dtype)
    packed = pack(dense)
    x, bias = torch.randn(tokens, columns).to(device, dtype), torch.randn(rows).to(device, dtype)
    a = torch.randn(rank, columns, device=device) / rank**0.5 if rank else None
    b = torch.randn(rows, rank, device=device) if rank else None
    stored = (
        FewTokensWeight(packed.compressed, packed.bitmask, a, b)
        if form == "packed"
        else FewTokensWeight(dense, None, a, b)
    )

    def kernel() -> list[Tensor]:
        return [multiply(x, bias, stored) if x.is_cuda else multiply_triton(x, bias, *stored)]

    def plain(wide: torch.dtype) -> list[Tensor]:
        """Makes the weight, as it is made without the kernel."""
        weight = (unpack(packed.compressed, packed.bitmask, columns) if form == "packed" else dense).to(wide)
        if a is not None and b is not None:
            summed = torch.promote_types(wide, torch.float32)
            weight = ((weight.to(summed) + b.to(summed) @ a.to(summed)) * (weight != 0)).to(wide)
        return [F.linear(x.to(wide), weight, bias.to(wide))]

    what = f"masked product of a {form} weight, rank {rank}" if rank else "packed product"
    name = f"{what}, {str(dtype).removeprefix('torch.')}, {rows}×{columns}, {tokens} tokens"
    return KernelCase(name, kernel, lambda wide: partial(plain, wide), dtype)
