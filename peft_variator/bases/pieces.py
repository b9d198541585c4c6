"""The pieces that packing, unpacking and merging write: one stored weight in, its new form out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from .bits import mask_width
from .checkpoint import Checkpoint, StoredTensor
from .layout import PackedWeight
from .names import KeyNames
from .plan import PlannedWeight
from .shards import Piece
from .stored import StoredWeight
from .writer import TensorSpec


__all__ = [
    "dense_piece",
    "layers_left_dense",
    "own_dtype",
    "packed_names",
    "packed_piece",
    "packed_specs",
    "planned_piece",
    "replaced_piece",
]


def own_dtype(weight: StoredWeight, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight is stored in, or `dtype` for 8-bit values."""
    return dtype if weight.quantized else weight.main.dtype


def packed_specs(weight: StoredWeight, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Names and forms of the packed tensors of a weight."""
    rows, columns = weight.size()
    return {
        f"{weight.module}.compressed": TensorSpec(dtype, (rows, columns // 2)),
        f"{weight.module}.bitmask": TensorSpec(torch.uint8, (rows, mask_width(columns))),
        f"{weight.module}.shape": TensorSpec(torch.int64, (2, 1)),
    }


def packed_names(weight: StoredWeight, packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a packed weight by the names that `packed_specs` gives them."""
    return {f"{weight.module}.{part}": tensor for part, tensor in packed._asdict().items()}


def packed_piece(weight: StoredWeight, dtype: torch.dtype) -> Piece:
    """A piece that packs one stored weight."""
    specs = packed_specs(weight, dtype)
    return Piece(weight.sources, specs, lambda: packed_names(weight, weight.read_packed(dtype)))


def dense_piece(weight: StoredWeight, dtype: torch.dtype) -> Piece:
    """A piece that unpacks, or rescales, one stored weight."""
    specs = {weight.name: TensorSpec(dtype, weight.size())}
    return Piece(weight.sources, specs, lambda: {weight.name: weight.read_dense(dtype)})


def replaced_piece(weight: StoredWeight, dtype: torch.dtype, new: StoredTensor) -> Piece:
    """A piece that writes `new`, as a dense tensor, in the place of a stored weight or another parameter."""
    specs = {weight.name: TensorSpec(dtype, new.shape)}
    return Piece(weight.sources, specs, lambda: {weight.name: new.read().to(dtype)})


def planned_piece(weight: PlannedWeight) -> Piece:
    """The piece for a weight that is planned to be packed or dense."""
    make = packed_piece if weight.action == "packed" else dense_piece
    return make(weight.stored, own_dtype(weight.stored, weight.dtype))


def layers_left_dense(model: PreTrainedModel, checkpoint: Checkpoint, packed: Iterable[str]) -> list[str]:
    """The linear layers that are not packed, by their name in the checkpoint, or in the model where they have none.

    Args:
        model: dense model.
        checkpoint: the source.
        packed: names in the model of the layers that are.
    """
    names = KeyNames(model)
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear} - set(packed)
    stored = {(names.parameter(name) or "").rpartition(".")[0]: name.rpartition(".")[0] for name in checkpoint.tensors}
    return sorted(stored.get(name, name) for name in dense)
