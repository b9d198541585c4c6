"""Counting floating-point operations with torch's `FlopCounterMode`, with the gaps in its table filled or reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..compat import TorchDispatchMode


__all__ = ["count_flops"]

_Shape = tuple[int, ...]

# Parts of operator names that stand for a product of matrices. An operator whose name has one of them and which has no
# formula would be counted as free, so it is reported instead.
_PRODUCTS = frozenset(
    "addbmm addmm addmv addr attention baddbmm bmm conv1d conv2d conv3d convolution dot gru linear lstm matmul mm mv "
    "rnn transformer trilinear vdot".split()
)


def _sdpa(query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any) -> int:
    """Attention on CPU, counted like torch's formula for GPUs: all scores, also those that a mask removes."""
    return sdpa_flop_count(query, key, value)


def _mv(matrix: _Shape, vector: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _addmv(bias: _Shape, matrix: _Shape, vector: _Shape, *args: Any, **kwargs: Any) -> int:
    return _mv(matrix, vector)


def _addmm_(target: _Shape, left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return _int_mm(left, right)


def _dot(left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0]


def _grouped_mm(tokens: _Shape, weights: _Shape, *args: Any, **kwargs: Any) -> int:
    """Experts of a mixture: groups of `tokens` (all tokens, in), each times one of `weights` (experts, in, out)."""
    return 2 * tokens[-2] * tokens[-1] * weights[-1] * (weights[0] if len(tokens) == 3 else 1)


def _int_mm(left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _by_output(inputs: _Shape, *args: Any, out_shape: _Shape, **kwargs: Any) -> int:
    """A linear map whose weight is packed: inputs (…, in), output (…, out)."""
    return 2 * torch.Size(inputs).numel() * out_shape[-1]


# Products in int8 and int4 count as those in floating point do: the same multiplications and additions.
_FORMULAS = {
    getattr(torch.ops.aten, name): formula
    for name, formula in {
        "_scaled_dot_product_flash_attention_for_cpu": _sdpa,
        "mv": _mv,
        "addmv": _addmv,
        "addmm_": _addmm_,
        "dot": _dot,
        "_grouped_mm": _grouped_mm,
        "_int_mm": _int_mm,
        "_weight_int8pack_mm": _by_output,
        "_weight_int4pack_mm": _by_output,
        "_weight_int4pack_mm_for_cpu": _by_output,
        "_weight_int4pack_mm_with_scales_and_zeros": _by_output,
        "_dyn_quant_matmul_4bit": _by_output,
    }.items()
    if hasattr(torch.ops.aten, name)  # PyTorch 2.6 has not all of them
} | {
    getattr(torch.ops.quantized, name): _by_output
    for name in (
        "linear",
        "linear_relu",
        "linear_dynamic",
        "linear_dynamic_fp16",
        "linear_relu_dynamic",
        "linear_relu_dynamic_fp16",
    )
}


class _UncountedProducts(TorchDispatchMode):
    """Collects the names of matrix products that `counter` has no formula for."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.formulas = counter.flop_registry
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = func.overloadpacket
        if operator not in self.formulas and _PRODUCTS & set(operator.__name__.split("_")):
            self.names.add(str(operator))
        return func(*args, **(kwargs or {}))


@contextmanager
def _in_single_operators() -> Iterator[None]:
    """Have torch's own attention and encoder layers run as the operators that they consist of, not as one."""
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)


@torch.no_grad()
def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Floating-point operations of `model(**inputs)`; a multiplication and an addition count as two.

    Matrix products, convolutions and attention are counted, as in torch's `FlopCounterMode`; element-wise operations,
    normalisation, gathering and softmax are not, as is the custom. Products in int8 and int4, of torch's own
    quantisation and torchao's, count as those in floating point. Attention counts the full square of scores, with or
    without a mask. The model runs twice, the first time uncounted, so that what it builds once (rotary tables, masks,
    lazy layers) is not taken for a part of every call. Gradients are off, so a training step is not what is counted.

    Args:
        model: any module; it is left in the mode (train or eval) in which it is.
        inputs: keyword arguments of its forward.

    Raises:
        ValueError: the model uses a matrix product that has no formula; it would count as free.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with _in_single_operators():
        model(**inputs)
        with _UncountedProducts(counter) as uncounted, counter:
            model(**inputs)
    if uncounted.names:
        raise ValueError(
            f"No FLOP formula is known for {', '.join(sorted(uncounted.names))}, so {type(model).__name__} would seem "
            "cheaper than it is. Count the uncompiled model, in floating point or int8."
        )
    return counter.get_total_flops()
