"""Counting floating-point operations with torch's `FlopCounterMode`, with the gaps in its table filled or reported."""

from __future__ import annotations

from collections.abc import Mapping
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
    "rnn vdot".split()
)


def _sdpa(query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any) -> int:
    """Attention on CPU, counted like torch's formula for GPUs: all scores, also those that a mask removes."""
    return sdpa_flop_count(query, key, value)


def _mv(matrix: _Shape, vector: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _addmv(bias: _Shape, matrix: _Shape, vector: _Shape, *args: Any, **kwargs: Any) -> int:
    return _mv(matrix, vector)


def _addmm_(target: _Shape, left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _dot(left: _Shape, right: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * left[0]


def _grouped_mm(tokens: _Shape, weights: _Shape, *args: Any, **kwargs: Any) -> int:
    """Experts of a mixture: groups of `tokens` (all tokens, in), each times one of `weights` (experts, in, out)."""
    return 2 * tokens[-2] * tokens[-1] * weights[-1] * (weights[0] if len(tokens) == 3 else 1)


_FORMULAS = {
    getattr(torch.ops.aten, name): formula
    for name, formula in {
        "_scaled_dot_product_flash_attention_for_cpu": _sdpa,
        "mv": _mv,
        "addmv": _addmv,
        "addmm_": _addmm_,
        "dot": _dot,
        "_grouped_mm": _grouped_mm,
    }.items()
    if hasattr(torch.ops.aten, name)  # PyTorch 2.6 has no _grouped_mm
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


@torch.no_grad()
def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Floating-point operations of `model(**inputs)`; a multiplication and an addition count as two.

    Matrix products, convolutions and attention are counted, as in torch's `FlopCounterMode`; element-wise operations,
    normalisation, gathering and softmax are not, as is the custom. Attention counts the full square of scores, with or
    without a mask. The model runs twice, the first time uncounted, so that what it builds once (rotary tables, masks,
    lazy layers) is not taken for a part of every call. Gradients are off, so a training step is not what is counted.

    Args:
        model: any module; it is left in the mode (train or eval) in which it is.
        inputs: keyword arguments of its forward.

    Raises:
        ValueError: the model uses a matrix product that has no formula, e.g. an int8 kernel; it would count as free.
    """
    model(**inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with _UncountedProducts(counter) as uncounted, counter:
        model(**inputs)
    if uncounted.names:
        raise ValueError(
            f"No FLOP formula is known for {', '.join(sorted(uncounted.names))}, so {type(model).__name__} would seem "
            "cheaper than it is. Count the unquantised, uncompiled model."
        )
    return counter.get_total_flops()
