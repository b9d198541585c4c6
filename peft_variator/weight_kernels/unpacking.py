"""The dense weight of a packed 2:4 one, in C++: for more tokens than the products are for."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import load_compiled, runs_on


__all__ = ["can_unpack", "unpack_into"]

_SIZES = (2, 4)  # bytes a value


def can_unpack(values: Tensor, places: Tensor, out: Tensor) -> bool:
    """Whether `unpack_into` takes these: plain tensors on a CPU, where nobody has to see the operators.

    Args:
        values: the kept values, (out_features, in_features / 2).
        places: uint8 (out_features, ceil(in_features / 8)).
        out: contiguous, (out_features, in_features) of the dtype of `values`.
    """
    return values.element_size() in _SIZES and runs_on("unpacking", values, places, out)


def unpack_into(values: Tensor, places: Tensor, out: Tensor, level: int | None = None) -> None:
    """Write the dense weight into `out`, its zeros +0.0; bits are moved, so it is the same for every dtype of a size.

    Args:
        values: as in `can_unpack`, and so on.
        places: two bits in every group of four columns.
        out: where it is written.
        level: index into `LEVELS`; by default the best of this processor.
    """
    compiled = load_compiled("unpacking")
    values, places = values.detach().contiguous(), places.contiguous()
    compiled.function(
        *(tensor.data_ptr() for tensor in (values, places, out)),
        *out.shape,
        out.element_size(),
        compiled.level if level is None else level,
        max(1, min(torch.get_num_threads(), out.shape[0])),
    )
