"""The formats in which checkpoints store the weight of a linear layer: one codec each, and what they have in common.

- `sparse-24-bitmask`: the layout of `peft_variator.bases.packing`.
- `sparse-bitmask`: `compressed` (non-zero weights,), `bitmask` as above with any number of bits, `shape`, and
  `row_offsets` (out_features,), where the values of each row start. A vector counts as one row.
- `dense`: `weight` (out_features, in_features).

Each can hold 8-bit values, float8_e4m3fn or int8, beside a `weight_scale` for the tensor (1,), for each output
(out_features, 1) or for each group of inputs (out_features, groups), and a `weight_zero_point` of the same shape. The
weight is then (value - zero point) · scale; only zero points of 0 leave pruned weights at 0, so no other is read.

A new format is one more subclass of `WeightCodec` in `CODECS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..bitmask import mask_width, unpack_mask
from ..model_files import CheckpointError
from .checkpoint import StoredTensor
from .packing import LayoutError, PackedWeight, check_packed, check_packed_sizes, gather_kept, pack, unpack


__all__ = ["CODECS", "Parts", "StoredWeight", "WeightCodec", "find_stored_weights"]

Parts = Mapping[str, Tensor]
"""The tensors of a stored weight by part: `"compressed"`, `"bitmask"`, `"weight_scale"` and so on."""

_FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)
_SCALE_PARTS = ("weight_scale", "weight_zero_point")
# Scales of activations belong to the layer but are read over: its product is not quantized here.
_ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_UNREADABLE_PARTS = ("weight_packed", "scale_packed", "weight_g_idx", "weight_global_scale")


class WeightCodec(ABC):
    """How one format lays out a weight. Values may have 8 bits and a scale in each format."""

    name: ClassVar[str]
    """The `format` of config.json."""
    parts: ClassVar[tuple[str, ...]]
    """The parts that a weight consists of; the first holds the values."""
    sparse: ClassVar[bool] = True
    """Whether zeros are left out."""
    two_four: ClassVar[bool] = False
    """Whether nothing but 2:4 weights can be stored."""

    @abstractmethod
    def recognises(self, parts: Mapping[str, StoredTensor]) -> bool:
        """Whether these parts, possibly not all of them, are a weight in this format."""

    @abstractmethod
    def decode_values(self, parts: Parts, name: str) -> Tensor:
        """The dense weight, (out_features, in_features) or a vector, before the scale, in the dtype of its values."""

    def check_structure(self, parts: Parts, name: str) -> None:  # noqa: B027 (a dense weight has none)
        """Check all that can be wrong with shapes and masks; raises LayoutError with the row where there is one."""

    def size(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """Shape of the dense weight, as the checkpoint says."""
        return tuple(parts["shape"].read().flatten().tolist())

    def check(self, parts: Parts, name: str) -> None:
        """Check all that can be wrong with a stored weight, without decoding it.

        Raises:
            LayoutError: naming the tensor, as a part of `name`, and, where there is one, the row.
        """
        self.check_sizes(parts, name)
        self.check_structure(parts, name)
        values = parts[self.parts[0]]
        if values.dtype in _QUANTIZED_DTYPES and "weight_scale" not in parts:
            raise LayoutError(f"{name} holds 8-bit values, but {name}.weight_scale is missing.")
        zero_point = parts.get("weight_zero_point")
        if zero_point is not None and zero_point.float().any():
            rows = zero_point.float().reshape(len(zero_point) if zero_point.ndim else 1, -1).any(dim=1)
            raise LayoutError(
                f"{name}.weight_zero_point, row {int(rows.nonzero()[0])}: it is not 0, so the weights that pruning "
                "removed would not be 0."
            )

    def check_sizes(self, parts: Mapping[str, Tensor | StoredTensor], name: str) -> None:
        """The part of `check` for which no values are read but those of `shape`, a tensor where there is one.

        Raises:
            LayoutError: naming the tensor, as a part of `name`.
        """
        values = parts[self.parts[0]]
        if values.dtype not in (*_FLOATING_DTYPES, *_QUANTIZED_DTYPES):
            raise LayoutError(f"{name}.{self.parts[0]} is {values.dtype}, which is no dtype of a weight.")
        if "shape" in parts and parts["shape"].dtype != torch.int64:
            raise LayoutError(f"{name}.shape is {parts['shape'].dtype}, but sizes are torch.int64.")

    def decode_packed(self, parts: Parts, dtype: torch.dtype, name: str) -> PackedWeight:
        """The packed weight in `dtype`; a product with a scale is rounded once, to `dtype`.

        Raises:
            LayoutError: the weight is not 2:4, or the parts don't fit together.
        """
        return pack(self.decode_dense(parts, dtype, name), name if self.sparse else f"{name}.weight")

    def decode_dense(self, parts: Parts, dtype: torch.dtype, name: str) -> Tensor:
        """The dense weight (out_features, in_features), or vector, in `dtype`.

        Raises:
            LayoutError: the parts don't fit together.
        """
        values = self.decode_values(parts, name)
        if "weight_scale" not in parts:
            return values.to(dtype)
        weight = values.float() * _spread_scale(parts["weight_scale"], values.shape[0], values.shape[1], name)
        return weight.masked_fill_(weight == 0, 0.0).to(dtype)


class Sparse24Codec(WeightCodec):
    """Two values and four bits for every four weights."""

    name = "sparse-24-bitmask"
    parts = PackedWeight._fields
    two_four = True

    def recognises(self, parts: Mapping[str, StoredTensor]) -> bool:
        """Any part of a bitmask, but values in one row."""
        return bool({*self.parts, "row_offsets"} & parts.keys())

    def check_sizes(self, parts: Mapping[str, Tensor | StoredTensor], name: str) -> None:
        """The three tensors belong together."""
        super().check_sizes(parts, name)
        size, bitmask = parts["shape"], parts["bitmask"]
        if not isinstance(size, Tensor):
            raise TypeError(f"{name}.shape is {size}, not a tensor.")
        check_packed_sizes(size, parts["compressed"].shape, bitmask.shape, bitmask.dtype, name)

    def check_structure(self, parts: Parts, name: str) -> None:
        """See `check_packed`."""
        check_packed(PackedWeight(parts["compressed"], parts["bitmask"], parts["shape"]), name)

    def decode_packed(self, parts: Parts, dtype: torch.dtype, name: str) -> PackedWeight:
        """The tensors as they are, scaled and cast."""
        self.check_structure(parts, name)
        values, bitmask = parts["compressed"], parts["bitmask"]
        if "weight_scale" in parts:
            scale = _spread_scale(parts["weight_scale"], len(values), 2 * values.shape[1], name)
            values = values.float() * (scale if scale.shape[1] == 1 else gather_kept(scale, bitmask))
        values = values.to(dtype)
        return PackedWeight(values.masked_fill(values == 0, 0.0), bitmask, parts["shape"].reshape(2, 1))

    def decode_dense(self, parts: Parts, dtype: torch.dtype, name: str) -> Tensor:
        """The packed weight, unpacked."""
        packed = self.decode_packed(parts, dtype, name)
        return unpack(packed.compressed, packed.bitmask, 2 * packed.compressed.shape[1])

    def decode_values(self, parts: Parts, name: str) -> Tensor:
        """The stored values, unpacked."""
        self.check_structure(parts, name)
        return unpack(parts["compressed"], parts["bitmask"], 2 * parts["compressed"].shape[1])


class SparseBitmaskCodec(WeightCodec):
    """The values that are not zero in one row, and a bit for every weight."""

    name = "sparse-bitmask"
    parts = ("compressed", "bitmask", "shape", "row_offsets")

    def recognises(self, parts: Mapping[str, StoredTensor]) -> bool:
        """Values in one row."""
        return "compressed" in parts and len(parts["compressed"].shape) == 1

    def check_structure(self, parts: Parts, name: str) -> None:
        """Sizes, bits past the end, and as many values as bits."""
        size, bitmask, values = parts["shape"].flatten().tolist(), parts["bitmask"], parts["compressed"]
        if not 1 <= len(size) <= 2 or min(size) < 1:
            raise LayoutError(f"{name}.shape holds {size}, but a matrix has two positive sizes and a vector one.")
        width = mask_width(size[-1])
        if tuple(bitmask.shape) != (*size[:-1], width) or bitmask.dtype != torch.uint8:
            raise LayoutError(
                f"{name}.bitmask is {bitmask.dtype} {tuple(bitmask.shape)}, but a weight of shape {size} has "
                f"torch.uint8 {(*size[:-1], width)}."
            )
        bits = unpack_mask(bitmask.view(-1, width), 8 * width)
        if bits[:, size[-1] :].any():
            row = int(bits[:, size[-1] :].any(dim=1).nonzero()[0])
            raise LayoutError(f"{name}.bitmask, row {row}: bits are set past the last column. The file is damaged.")
        counts, offsets = bits.sum(dim=1), parts["row_offsets"].flatten()
        if offsets.shape != counts.shape:
            raise LayoutError(f"{name}.row_offsets has {len(offsets)} entries, but the weight has {len(counts)} rows.")
        ends = torch.cat((offsets[1:], offsets.new_tensor([len(values)])))
        if not torch.equal(offsets + counts, ends):
            row = int((offsets + counts != ends).nonzero()[0])
            raise LayoutError(
                f"{name}.bitmask, row {row}: it keeps {int(counts[row])} weights, but row_offsets give it "
                f"{int(ends[row] - offsets[row])} of the {len(values)} values. The file is damaged."
            )

    def decode_values(self, parts: Parts, name: str) -> Tensor:
        """The values at the places of the bits."""
        self.check_structure(parts, name)
        size, values = parts["shape"].flatten().tolist(), parts["compressed"]
        if values.element_size() == 1:
            values = values.view(torch.uint8)  # 8-bit floats can't be indexed
        weight = values.new_zeros(size)
        weight.view(-1, size[-1])[unpack_mask(parts["bitmask"].view(-1, mask_width(size[-1])), size[-1])] = values
        return weight.view(parts["compressed"].dtype)


class DenseCodec(WeightCodec):
    """The weight itself."""

    name = "dense"
    parts = ("weight",)
    sparse = False

    def recognises(self, parts: Mapping[str, StoredTensor]) -> bool:
        """A matrix, or 8-bit values of any shape."""
        weight = parts.get("weight")
        return weight is not None and (len(weight.shape) == 2 or weight.dtype in _QUANTIZED_DTYPES)

    def size(self, parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """Shape of the tensor."""
        return parts["weight"].shape

    def decode_values(self, parts: Parts, name: str) -> Tensor:
        """The tensor."""
        return parts["weight"]


CODECS: dict[str, WeightCodec] = {codec.name: codec for codec in (SparseBitmaskCodec(), Sparse24Codec(), DenseCodec())}
"""Every format by name, in the order in which they are asked whether they recognise a weight."""

_FORMAT_PARTS = tuple(dict.fromkeys(part for codec in CODECS.values() for part in codec.parts))


@dataclass(frozen=True)
class StoredWeight:
    """The tensors that hold one parameter.

    Args:
        name: the parameter's name in the checkpoint were it stored as one dense tensor, for example `"layer.weight"`.
        codec: the format that they are in.
        parts: part, for example `"bitmask"` or `"weight_scale"`, -> its tensor.
    """

    name: str
    codec: WeightCodec
    parts: dict[str, StoredTensor]

    @classmethod
    def of_dense(cls, stored: StoredTensor) -> StoredWeight:
        """A tensor of any shape that is stored as it is."""
        return cls(stored.name, CODECS["dense"], {"weight": stored})

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
        return self.parts[self.codec.parts[0]]

    @property
    def quantized(self) -> bool:
        """Whether the values have 8 bits and need a scale."""
        return self.main.dtype in _QUANTIZED_DTYPES

    @property
    def plain(self) -> bool:
        """Whether the weight is one dense tensor without a scale."""
        return not self.codec.sparse and not self.quantized

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """All parts, the one with the values first."""
        return (self.main, *(part for part in self.parts.values() if part is not self.main))

    @property
    def matches_packed_layer(self) -> bool:
        """Whether `Sparse24Linear` can take the tensors under the names they have."""
        names = {part: stored.name for part, stored in self.parts.items()}
        return not self.quantized and names == {part: f"{self.module}.{part}" for part in PackedWeight._fields}

    def own_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that it is stored in, or `dtype` for 8-bit values."""
        return dtype if self.quantized else self.main.dtype

    def read(self) -> dict[str, Tensor]:
        """All parts."""
        return {part: stored.read() for part, stored in self.parts.items()}

    def size(self) -> tuple[int, ...]:
        """Shape of the dense weight, as the checkpoint says."""
        return self.codec.size(self.parts)

    def check(self) -> None:
        """Check all that can be wrong with the weight, reading its small parts alone.

        Raises:
            CheckpointError: naming file, tensor and, where there is one, the row.
        """
        with self._naming_file():
            self.codec.check(self.read(), self.prefix)

    def check_sizes(self) -> None:
        """Check what headers and sizes tell of it; `check` does so, too.

        Raises:
            CheckpointError: naming file and tensor.
        """
        sizes = {"shape": self.parts["shape"].read()} if "shape" in self.parts else {}
        with self._naming_file():
            self.codec.check_sizes({**self.parts, **sizes}, self.prefix)

    def read_packed(self, dtype: torch.dtype) -> PackedWeight:
        """The packed weight in `dtype`.

        Raises:
            CheckpointError: it is not 2:4; the message names file, tensor and row.
        """
        with self._naming_file():
            return self.codec.decode_packed(self.read(), dtype, self.prefix)

    def read_dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out_features, in_features) in `dtype`.

        Raises:
            CheckpointError: the parts don't fit together.
        """
        with self._naming_file():
            return self.codec.decode_dense(self.read(), dtype, self.prefix)

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        try:
            yield
        except LayoutError as error:
            raise CheckpointError(f"{self.main.file}: {error}") from error


def find_stored_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredWeight]:
    """Group a checkpoint's tensors into weights, by parameter name; every dense matrix called `weight` counts as one.

    Raises:
        CheckpointError: a part is missing, or a weight is stored in a format that can't be read.
    """
    parts_of: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part in _UNREADABLE_PARTS:
            raise CheckpointError(
                f"{stored}: 4-bit and reordered layouts can't be read. These can: sparse-24-bitmask, sparse-bitmask "
                "and dense weights, in 16 or 32 bits, or in float8_e4m3fn or int8 with scales."
            )
        if part in (*_FORMAT_PARTS, *_SCALE_PARTS, *_ACTIVATION_PARTS):
            # Up to compressed-tensors 0.8.1 the parts of any parameter were called <parameter>.compressed and so on,
            # later <layer>.compressed.
            old = part != "weight" and part in _FORMAT_PARTS and prefix.endswith((".weight", ".bias"))
            parts_of.setdefault(prefix if old else f"{prefix}.weight", {})[part] = stored
    weights = {name: _stored_weight(name, parts) for name, parts in parts_of.items()}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _stored_weight(name: str, parts: dict[str, StoredTensor]) -> StoredWeight | None:
    codec = next((codec for codec in CODECS.values() if codec.recognises(parts)), None)
    if codec is None:
        return None
    found = next(parts[part] for part in (*codec.parts, *_FORMAT_PARTS) if part in parts)
    for part in codec.parts:
        if part not in parts:
            missing = f"{found.name.rpartition('.')[0]}.{part}"
            raise CheckpointError(f"{found}: {missing} is missing. The checkpoint is incomplete.")
    if codec.sparse and "weight" in parts:
        raise CheckpointError(f"{found}: the weight is also stored dense, as {parts['weight']}.")
    return StoredWeight(name, codec, parts)


def _spread_scale(scale: Tensor, rows: int, columns: int, name: str) -> Tensor:
    """A stored scale in float32 as (1, 1), (rows, 1) or (rows, columns)."""
    if scale.numel() == 1:
        return scale.float().reshape(1, 1)
    if scale.ndim == 2 and scale.shape[0] == rows and scale.shape[1] and columns % scale.shape[1] == 0:
        groups = scale.shape[1]
        return scale.float() if groups == 1 else scale.float().repeat_interleave(columns // groups, dim=1)
    raise LayoutError(
        f"{name}.weight_scale has shape {tuple(scale.shape)}, but a {rows}×{columns} weight has one scale, one for "
        f"each row, ({rows}, 1), or one for each group of columns, ({rows}, groups)."
    )
