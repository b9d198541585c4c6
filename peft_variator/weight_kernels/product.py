"""The products: on a CPU in C++ that is compiled at its first use (`compiled`), on a GPU in Triton (`triton_kernel`).

One token needs every weight once: a product that reads the packed form as it lies moves 0.5625 of the bytes of a dense
one in 16 bits. Under an update, (W + B·A) ⊙ M is summed a tile at a time in registers, from what A and B are in this
very call, or, for a token or two on a packed W, as a sum beside the product of W: nothing of it is kept, so nothing
can be stale. With more tokens making the weight once pays. Which is faster on this machine is measured at the first
call of each shape and remembered while the process runs. Without a compiler everything runs as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..triton_support import runs_triton, triton_state
from .compiled import LEVELS, load_compiled, runs_on
from .measured import fastest


__all__ = [
    "MAX_TOKENS",
    "MIN_WEIGHTS",
    "FewTokensWeight",
    "can_multiply",
    "describe_product",
    "is_faster",
    "is_few",
    "multiply",
]

MAX_TOKENS = 16
"""The most tokens that it is tried for."""

MIN_WEIGHTS = 1 << 16
"""Layers with fewer weights take microseconds either way."""

_DTYPES = (torch.bfloat16, torch.float32)


class FewTokensWeight(NamedTuple):
    """A weight W, packed 2:4 or dense, or (W + B·A) ⊙ M, as what is stored of it.

    Args:
        values: dense (out_features, in_features), or the kept values of a packed W, (out_features, in_features / 2).
        places: uint8 (out_features, ceil(in_features / 8)), where they stand; `None`: they are dense.
        a: A, float32 (rank, in_features); `None`: there is no update, and W is packed.
        b: B, float32 (out_features, rank).
        kept: M, as `places`; `None`: the places of a packed W, and where a dense one is not 0.
    """

    values: Tensor
    places: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    kept: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.values.shape[1] if self.places is None else 2 * self.values.shape[1]

    def contiguous(self) -> FewTokensWeight:
        """The same without gradients, each row after the other."""
        parts = (None if part is None else part.detach().contiguous() for part in self)
        return FewTokensWeight(*parts)  # type: ignore[arg-type]


def describe_product(out_features: int, in_features: int, dtype: torch.dtype, device_type: str = "cpu") -> str | None:
    """What a layer does for a few tokens and why, in one clause; `None`: it is too small, or on another device.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: dtype of the product.
        device_type: where it is computed, as in `torch.device.type`.
    """
    if out_features * in_features < MIN_WEIGHTS or device_type not in ("cpu", "cuda"):
        return None
    if device_type == "cuda":
        runs, reason = triton_state(device_type)
        if not runs:
            return f"also for few tokens, since the product of the packed form can't be used: {reason}"
        return (
            f"but up to {MAX_TOKENS} tokens take the product of the packed form ({reason}) where it is measured faster"
        )
    if dtype not in _DTYPES:
        return f"also for few tokens, since the product of the packed form has no {str(dtype).removeprefix('torch.')}"
    product = load_compiled("products")
    if product.function is None:
        return f"also for few tokens, since the product of the packed form can't be used: {product.reason}"
    level = LEVELS[min(product.level, 2 if dtype == torch.float32 else 3)]
    return f"but up to {MAX_TOKENS} tokens take the product of the packed form ({level}) where it is measured faster"


def multiply(input: Tensor, bias: Tensor | None, weight: FewTokensWeight, level: int | None = None) -> Tensor:
    """x·Wᵀ + b, summed in float32; also (W + B·A) ⊙ M, which is not rounded to the dtype in between.

    Args:
        input: (..., in_features), bfloat16 or float32 on a CPU, float16 as well on a GPU.
        bias: (out_features,), of the same dtype.
        weight: of the same dtype.
        level: index into `LEVELS`, on a CPU; by default the best of this processor.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: the product can't be used here, or the processor lacks the instruction set.
    """
    rows, columns = weight.values.shape[0], weight.in_features
    x, weight = input.detach().reshape(-1, columns).contiguous(), weight.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    multiply_rows = _multiply_by_triton if x.is_cuda else _multiply_by_cpp
    return multiply_rows(x, bias, weight, level).view(*input.shape[:-1], rows)


def _multiply_by_cpp(x: Tensor, bias: Tensor | None, weight: FewTokensWeight, level: int | None) -> Tensor:
    product = load_compiled("products")
    if product.function is None:
        raise RuntimeError(f"The product of the packed form can't be used: {product.reason}.")
    if level is not None and not 0 <= level <= product.level:
        raise RuntimeError(f"level is {level}; this processor has 0 to {product.level}.")
    rows = weight.values.shape[0]
    output = x.new_empty(x.shape[0], rows)
    tensors = (x, weight.values, weight.places, weight.kept, weight.a, weight.b, bias, output)
    product.function(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        x.shape[0],
        rows,
        x.shape[1],
        0 if weight.a is None else weight.a.shape[0],
        x.element_size(),
        product.level if level is None else level,
        max(1, min(torch.get_num_threads(), rows)),
    )
    return output


def _multiply_by_triton(x: Tensor, bias: Tensor | None, weight: FewTokensWeight, level: int | None) -> Tensor:
    runs, reason = triton_state("cuda")
    if not runs:
        raise RuntimeError(f"The product of the packed form can't be used: {reason}.")
    from .triton_kernel import multiply_triton

    return multiply_triton(x, bias, *weight)


def is_few(input: Tensor, weights: int) -> bool:
    """Whether a product is worth a thought: few tokens of input (..., in_features), and as many weights."""
    return 0 < input.numel() // max(input.shape[-1], 1) <= MAX_TOKENS and weights >= MIN_WEIGHTS


def is_faster(
    input: Tensor, bias: Tensor | None, weight: FewTokensWeight, other: Callable[[], Tensor], name: str = "plain"
) -> bool:
    """Whether `multiply` takes these, and is faster than what is done else, measured once a shape and thread count.

    Args:
        input: as in `multiply`, and so on.
        bias: its bias.
        weight: its weight.
        other: the same product in another way: by making the weight, or on sparse tensor cores.
        name: of the other way.
    """
    if not is_few(input, weight.values.shape[0] * weight.in_features) or not can_multiply(input, bias, weight):
        return False
    ways = {name: other, "few tokens": lambda: multiply(input, bias, weight)}
    return fastest((name, *_key(input, weight)), ways, input.device) == "few tokens"


def _key(input: Tensor, weight: FewTokensWeight) -> tuple[object, ...]:
    shapes = tuple(None if part is None else tuple(part.shape) for part in weight)
    return (shapes, input.dtype, input.numel() // input.shape[-1], input.device, torch.get_num_threads())


def can_multiply(input: Tensor, bias: Tensor | None, weight: FewTokensWeight) -> bool:
    """Whether these are plain tensors that the product of their device reads, and nobody has to see the operators."""
    tensors = [input, weight.values] if bias is None else [input, weight.values, bias]
    bits = [part for part in (weight.places, weight.kept) if part is not None]
    if bias is not None and bias.shape != weight.values.shape[:1]:
        return False  # one that is broadcast
    if not weight.values.is_contiguous() or any(type(part) not in (Tensor, nn.Parameter) for part in bits):
        return False
    if input.is_cuda:
        return runs_triton(*tensors)
    return (
        input.dtype in _DTYPES
        and all(tensor.dtype == input.dtype for tensor in tensors)
        and runs_on("products", *tensors)
    )
