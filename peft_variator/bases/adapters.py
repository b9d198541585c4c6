"""How SparseLoRA reads and writes the weight of a packed layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tuners.sparse_lora.base_weight import WeightLayout, register_layout
from .layout import unpack, unpack_mask
from .linear import Sparse24Linear


__all__ = ["PACKED_LAYOUT", "register_packed_layout"]


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [layer.get_parameter("compressed"), layer.get_parameter("bitmask")]


def _in_features(tensors: list[Tensor]) -> int:
    return 2 * tensors[0].shape[1]


def _write(layer: nn.Module, matrix: Tensor) -> None:
    assert isinstance(layer, Sparse24Linear)  # what the layout is registered for
    layer.write(matrix)


PACKED_LAYOUT = WeightLayout(
    name="sparse24",
    tensors=_tensors,
    shape=lambda tensors: torch.Size((tensors[0].shape[0], _in_features(tensors))),
    weight=lambda tensors: unpack(tensors[0], tensors[1], _in_features(tensors)),
    # The kept places, straight from the bitmask: those whose weight happens to be 0 are free to be learned, too.
    kept=lambda tensors: unpack_mask(tensors[1], _in_features(tensors)),
    flatten=lambda weight: weight,
    write=_write,
    rows=lambda tensors, rows: [tensor[rows] for tensor in tensors],
)
"""The accessors of `Sparse24Linear`."""


def register_packed_layout() -> None:
    """Let SparseLoRA wrap packed layers. Does nothing the second time."""
    register_layout(Sparse24Linear, PACKED_LAYOUT)
