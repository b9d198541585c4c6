"""(W + B·A) ⊙ M whole, as training needs it, and the gradients of A and B from that of the whole: C++ with AVX-512."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import load_compiled, runs_on
from .product import MIN_WEIGHTS, FewTokensWeight


__all__ = ["LEAST_LEVEL", "can_sum", "sum_gradients", "sum_weight"]

LEAST_LEVEL = 2
"""AVX-512, an index into `LEVELS`: with less the operators of PyTorch are as fast."""

_DTYPES = (torch.bfloat16, torch.float32)
_MAX_RANK = 64  # the work grows with it, and a product of matrices does more of it in the same time


def can_sum(weight: FewTokensWeight, matrix: Tensor) -> bool:
    """Whether the functions below take these: plain tensors on a CPU, where nobody has to see the operators.

    Args:
        weight: W, M, A and B; W bfloat16 or float32.
        matrix: (out_features, in_features), contiguous, bfloat16 or float32.
    """
    return (
        matrix.numel() >= MIN_WEIGHTS
        and weight.a is not None
        and 0 < weight.a.shape[0] <= _MAX_RANK
        and weight.values.dtype in _DTYPES
        and matrix.dtype in _DTYPES
        and matrix.is_contiguous()
        and runs_on("masked_weight", *weight, matrix, level=LEAST_LEVEL)
    )


def sum_weight(weight: FewTokensWeight, out: Tensor) -> Tensor:
    """Put (W + B·A) ⊙ M, summed in float32 and rounded once, into `out`, (out_features, in_features); returns it."""
    _call(weight, out, None, None)
    return out


def sum_gradients(weight: FewTokensWeight, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of A and B, in float32, from that of (W + B·A) ⊙ M.

    Args:
        weight: W, M, A and B.
        gradient: (out_features, in_features), with or without the mask applied.

    Returns:
        (rank, in_features) and (out_features, rank).
    """
    assert weight.a is not None  # see can_sum
    assert weight.b is not None
    of_a, of_b = torch.empty_like(weight.a), torch.empty_like(weight.b)
    _call(weight, gradient, of_a, of_b)
    return of_a, of_b


def _call(weight: FewTokensWeight, matrix: Tensor, of_a: Tensor | None, of_b: Tensor | None) -> None:
    weight = weight.contiguous()
    tensors = (weight.values, weight.places, weight.kept, weight.a, weight.b, matrix, of_a, of_b)
    rows, columns = matrix.shape
    load_compiled("masked_weight").function(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        rows,
        columns,
        0 if weight.a is None else weight.a.shape[0],
        weight.values.element_size(),
        matrix.element_size(),
        max(1, min(torch.get_num_threads(), rows)),
    )
