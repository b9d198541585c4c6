"""Finding the weights of linear layers among a checkpoint's tensors, in any layout that `decode` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import CheckpointError, StoredTensor
from .decode import Layout, check_parts, decode_dense, decode_packed
from .layout import LayoutError, PackedWeight


__all__ = ["StoredWeight", "find_stored_weights"]

_SPARSE_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_SCALE_PARTS = ("weight_scale", "weight_zero_point")
# Scales of activations belong to the layer but are read over: its product is not quantized here.
_ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_UNREADABLE_PARTS = ("weight_packed", "scale_packed", "weight_g_idx", "weight_global_scale")


@dataclass(frozen=True)
class StoredWeight:
    """The tensors that hold one parameter.

    Args:
        name: the parameter's name in the checkpoint were it stored as one dense tensor, for example `"layer.weight"`.
        layout: see `peft_variator.bases.decode`.
        parts: part, for example `"bitmask"` or `"weight_scale"`, -> its tensor.
    """

    name: str
    layout: Layout
    parts: dict[str, StoredTensor]

    @property
    def module(self) -> str:
        """Name of the layer that the parameter belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def prefix(self) -> str:
        """What the names of the parts begin with: `"layer"`, or `"layer.weight"` in old checkpoints."""
        return self.main.name.rpartition(".")[0]

    @property
    def main(self) -> StoredTensor:
        """The tensor with the values."""
        return self.parts["weight" if self.layout == "dense" else "compressed"]

    @property
    def quantized(self) -> bool:
        """Whether the values have 8 bits and need a scale."""
        return self.main.dtype in (torch.float8_e4m3fn, torch.int8)

    @property
    def plain(self) -> bool:
        """Whether the weight is one dense tensor without a scale."""
        return self.layout == "dense" and not self.quantized

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """All parts, the one with the values first."""
        return (self.main, *(part for part in self.parts.values() if part is not self.main))

    @property
    def as_is(self) -> bool:
        """Whether `Sparse24Linear` can take the tensors under the names they have."""
        names = {part: stored.name for part, stored in self.parts.items()}
        return not self.quantized and names == {part: f"{self.module}.{part}" for part in PackedWeight._fields}

    def read(self) -> dict[str, Tensor]:
        """All parts."""
        return {part: stored.read() for part, stored in self.parts.items()}

    def size(self) -> tuple[int, ...]:
        """Shape of the dense weight, as the checkpoint says."""
        return self.main.shape if self.layout == "dense" else tuple(self.parts["shape"].read().flatten().tolist())

    def check(self) -> None:
        """Check all that can be wrong with the weight, reading its small parts alone.

        Raises:
            CheckpointError: naming file, tensor and, where there is one, the row.
        """
        try:
            check_parts(self.layout, self.read(), self.prefix)
        except LayoutError as error:
            raise CheckpointError(f"{self.main.file}: {error}") from error

    def read_packed(self, dtype: torch.dtype) -> PackedWeight:
        """The packed weight in `dtype`.

        Raises:
            CheckpointError: it is not 2:4; the message names file, tensor and row.
        """
        try:
            return decode_packed(self.layout, self.read(), dtype, self.prefix)
        except LayoutError as error:
            raise CheckpointError(f"{self.main.file}: {error}") from error

    def read_dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out_features, in_features) in `dtype`.

        Raises:
            CheckpointError: the parts don't fit together.
        """
        try:
            return decode_dense(self.layout, self.read(), dtype, self.prefix)
        except LayoutError as error:
            raise CheckpointError(f"{self.main.file}: {error}") from error


def find_stored_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
    """Group a checkpoint's tensors into weights, by parameter name; every dense matrix called `weight` counts as one.

    Raises:
        CheckpointError: a part is missing, or a weight is stored in a layout that can't be read.
    """
    parts_of: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part in _UNREADABLE_PARTS:
            raise CheckpointError(
                f"{stored}: 4-bit and reordered layouts can't be read. These can: sparse-24-bitmask, sparse-bitmask "
                "and dense weights, in 16 or 32 bits, or in float8_e4m3fn or int8 with scales."
            )
        if part in ("weight", *_SPARSE_PARTS, *_SCALE_PARTS, *_ACTIVATION_PARTS):
            # Up to compressed-tensors 0.8.1 the parts of any parameter were called <parameter>.compressed and so on,
            # later <layer>.compressed.
            old = part in _SPARSE_PARTS and prefix.endswith((".weight", ".bias"))
            parts_of.setdefault(prefix if old else f"{prefix}.weight", {})[part] = stored
    weights = {name: _stored_weight(name, parts) for name, parts in parts_of.items()}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _stored_weight(name: str, parts: dict[str, StoredTensor]) -> StoredWeight | None:
    sparse = [parts[part] for part in _SPARSE_PARTS if part in parts]
    if not sparse:
        if "weight" not in parts:
            return None
        weight = StoredWeight(name, "dense", parts)
        return weight if weight.quantized or len(weight.main.shape) == 2 else None
    flat = "compressed" in parts and len(parts["compressed"].shape) == 1
    for part in _SPARSE_PARTS if flat else PackedWeight._fields:
        if part not in parts:
            missing = f"{sparse[0].name.rpartition('.')[0]}.{part}"
            raise CheckpointError(f"{sparse[0]}: {missing} is missing. The checkpoint is incomplete.")
    if "weight" in parts:
        raise CheckpointError(f"{sparse[0]}: the weight is also stored dense, as {parts['weight']}.")
    return StoredWeight(name, "sparse-bitmask" if flat else "sparse-24-bitmask", parts)
