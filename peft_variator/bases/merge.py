"""Merging a SparseLoRA adapter into its base on disk, without loading the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bitmask import unpack_mask
from ..model_files import CheckpointError, adapter_base
from ..tuners.sparse_lora.fingerprints import base_fingerprint, same_base
from .adapter_file import AdapterFile
from .checkpoint import TensorSpec
from .compressed_tensors import StoredWeight
from .convert import (
    ConversionReport,
    ModelFolder,
    OnProgress,
    Piece,
    dense_piece,
    file_states,
    layers_left_dense,
    packed_names,
    packed_specs,
    planned_piece,
    replaced_piece,
    rewrite,
)
from .loading_plan import KeyNames, PlannedWeight, is_free_linear, plan_weight
from .packing import PackedWeight, gather_kept, pack, unpack


__all__ = ["MergeReport", "merge_checkpoint"]


@dataclass(frozen=True)
class MergeReport(ConversionReport):
    """What a merge did.

    Args:
        merged: how many weights got an update under their mask.
        replaced: how many other tensors of the base the adapter has new values for.
        packed: how many layers are packed in the result; 0 for a dense one.
        unmasked: names of merged weights of which the base prunes nothing, so that the whole update went in.
    """

    merged: int
    replaced: int
    packed: int
    unmasked: tuple[str, ...] = ()


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    packed: bool | None = None,
    on_progress: OnProgress = lambda done, total: None,
    license: str | None = None,
) -> MergeReport:
    """Put a SparseLoRA adapter into its base, W ← (W + s·B·A) ⊙ M (arXiv 2404.02424), in a new model folder.

    The result is that of `merge_and_unload(safe_merge=True)` in memory: sums are made in float32 and rounded once, and
    every zero of M is +0.0. The biases that the adapter trained, and its `modules_to_save`, take the place of the
    base's; other tensors and files are copied. M is the one in memory, too: the bitmask of a packed base, the non-zero
    weights of a dense one, or what the adapter stores. See `rewrite` for memory, and for what happens when it is
    interrupted. Nothing in `base` and `adapter` is written.

    Args:
        base: folder with config.json and safetensors files, dense or in any layout that `load_base` reads.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        output: the folder to make.
        packed: write the packed form, or the dense one, whose config.json says nothing of sparsity; None keeps the
            form of the base.
        on_progress: called with the bytes done and those there are.
        license: identifier of the license to name in README.md; None leaves it as it is.

    Raises:
        CheckpointError: a file is damaged; the adapter is none of SparseLoRA, does not fit the base or was made for
            another one; no weight that it changes is pruned; its masks are not 2:4, or nothing is, and `packed` is
            True. The message names file and tensor.
        FileExistsError: `output` exists and is not empty.
    """
    _check_order(Path(base), Path(adapter))
    folder = ModelFolder.open(base)
    located = AdapterFile.open(adapter).locate(folder)
    if packed is None:
        packed = any(weight.codec.sparse for weight in located.weights.values())
    merge = _Merge(folder, located, packed)
    folder.check(merge.model)
    unmasked = merge.unmasked()
    pieces = merge.pieces()
    config = folder.config
    if packed:
        if not merge.packed_layers:
            raise CheckpointError(
                f"{folder.path}: no linear layer of {type(merge.model).__name__} is 2:4 with {located.path}, so there "
                "is nothing to pack. Merge to the dense form: --dense, or packed=False."
            )
        config = folder.packed_config(layers_left_dense(merge.model, folder.checkpoint, merge.packed_layers.values()))
    job = {"task": "merge", "adapter": file_states(located.files), "packed": packed}
    report = rewrite(folder, output, pieces, config, job, on_progress, license)
    return MergeReport(
        **vars(report),
        merged=len(located.modules),
        replaced=len(located.replaced),
        packed=len(merge.packed_layers),
        unmasked=tuple(unmasked),
    )


def _check_order(base: Path, adapter: Path) -> None:
    """Raise where the adapter is given as the base, and the base as the adapter."""
    if adapter_base(base) is not None and adapter_base(adapter) is None:
        raise CheckpointError(
            f"{str(base)!r} holds an adapter and {str(adapter)!r} does not: they are swapped. Give the base first, "
            f"then the adapter: merge {adapter} {base}"
        )


class _Merge:
    """What becomes of every weight of a base that an adapter is merged into.

    Args:
        folder: the base.
        adapter: the adapter, with the weights that it changes.
        packed: whether the result is to be packed.
    """

    def __init__(self, folder: ModelFolder, adapter: AdapterFile, packed: bool) -> None:
        self.model: PreTrainedModel = folder.skeleton()
        self._folder, self._adapter, self._packed = folder, adapter, packed
        self._names = KeyNames(self.model)
        self._plans = {name: self._plan(weight) for name, weight in adapter.weights.items()}

    def unmasked(self) -> list[str]:
        """Names of the weights that get an update and have no zero that it has to spare.

        Raises:
            CheckpointError: all of them, or the adapter was trained above a base with other zeros.
        """
        if self._adapter.stores_masks:
            return []
        unmasked = [name for name in self._adapter.modules if self._masks_nothing(self._adapter.weights[name])]
        if unmasked and len(unmasked) == len(self._adapter.modules):
            raise CheckpointError(
                f"{self._folder.path}: nothing is masked: none of the {len(unmasked)} weights that the adapter in "
                f"{self._adapter.path} changes has a zero, the first being {unmasked[0]}. With mask='weight' the "
                "zeros of the base are the mask: merge into the pruned model that the adapter was trained above, "
                "and not into its dense original."
            )
        recorded = self._adapter.config.base_fingerprint
        masks = (self._read(self._adapter.weights[name])[1] for name in self._adapter.modules)
        if recorded is not None and not same_base(recorded, base_fingerprint(masks) or ""):
            raise CheckpointError(
                f"{self._folder.path}: its zeros are others than those of the base that the adapter in "
                f"{self._adapter.path} was trained above (base_fingerprint in adapter_config.json). Merge into that "
                "base."
            )
        return unmasked

    def pieces(self) -> list[Piece]:
        """All that is not copied as it is.

        Raises:
            CheckpointError: a mask is not 2:4 and the result is to be packed.
        """
        pieces = (self._piece(name, weight) for name, weight in self._adapter.weights.items())
        return [piece for piece in pieces if piece is not None]

    @cached_property
    def packed_layers(self) -> dict[str, str]:
        """The layers that are packed in the result: the name of each one's weight, and the layer's in the model.

        Raises:
            CheckpointError: a stored mask is not 2:4.
        """
        weights = self._adapter.weights.items() if self._packed else ()
        packed = (name for name, weight in weights if self._packs(name, weight))
        return {name: (self._names.parameter(name) or "").rpartition(".")[0] for name in packed}

    def _packs(self, name: str, weight: StoredWeight) -> bool:
        """Whether a weight is packed where the result is to be."""
        if name in self._adapter.replaced:
            return False
        if name in self._adapter.modules and self._adapter.stores_masks:
            return self._can_be_packed(weight) and self._adapter.stores_two_four(name)
        planned = self._plans[name]
        return planned is not None and planned.becomes_packed

    def _plan(self, weight: StoredWeight) -> PlannedWeight | None:
        """What loading the base, or packing a dense one, makes of the weight."""
        if weight.name in self._adapter.replaced or (self._folder.published is None and not self._packed):
            return None
        return plan_weight(self.model, self._names, weight, self._folder.rules, self._folder.dtype)

    def _piece(self, name: str, weight: StoredWeight) -> Piece | None:
        """The piece for one weight; None where it is copied."""
        planned = self._plans[name]
        if name in self._adapter.replaced:
            return replaced_piece(weight, weight.own_dtype(self._folder.dtype), self._adapter.replaced[name])
        if name in self._adapter.modules:
            return self._merged_piece(name, weight)
        if planned is not None and name in self.packed_layers:
            return None if planned.action == "keep" else planned_piece(planned)
        if weight.plain or (planned is None and self._packed):
            return None
        return dense_piece(weight, self._dtype(weight))

    def _merged_piece(self, name: str, weight: StoredWeight) -> Piece:
        dtype = self._dtype(weight)
        if name not in self.packed_layers:
            specs = {name: TensorSpec(dtype, weight.size())}
            return Piece(weight.sources, specs, lambda: {name: self._merge_dense(weight)})
        return Piece(weight.sources, packed_specs(weight, dtype), lambda: self._merge_packed(weight))

    def _merge_dense(self, weight: StoredWeight) -> Tensor:
        dense = torch.empty(weight.size(), dtype=self._dtype(weight))
        matrix, kept, _ = self._read(weight)
        view = self._adapter.layout(weight.name).flatten(dense)
        view.copy_(self._adapter.merge(weight.name, matrix, kept))
        return dense

    def _merge_packed(self, weight: StoredWeight) -> dict[str, Tensor]:
        matrix, kept, bitmask = self._read(weight)
        merged = self._adapter.merge(weight.name, matrix, kept)
        if bitmask is None or self._adapter.stores_masks:
            return packed_names(weight, pack(merged, weight.name))
        shape = torch.tensor([[size] for size in merged.shape])
        return packed_names(weight, PackedWeight(gather_kept(merged, bitmask), bitmask, shape))

    def _read(self, weight: StoredWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        """W and the places that pruning kept, (out_features, in_features), and the bitmask of a packed weight."""
        dtype = self._dtype(weight)
        if not self._has_bitmask(weight):
            matrix = self._adapter.layout(weight.name).flatten(weight.read_dense(dtype))
            return matrix, matrix != 0, None
        packed = weight.read_packed(dtype)
        in_features = 2 * packed.compressed.shape[1]
        # also the zeros that a bitmask keeps are free to be learned
        kept = unpack_mask(packed.bitmask, in_features)
        return unpack(packed.compressed, packed.bitmask, in_features), kept, packed.bitmask

    def _has_bitmask(self, weight: StoredWeight) -> bool:
        """Whether the base is loaded with this weight packed, so that the adapter saw its bitmask as the mask."""
        planned = self._plans[weight.name]
        return self._folder.published is not None and planned is not None and planned.becomes_packed

    def _masks_nothing(self, weight: StoredWeight) -> bool:
        return not self._has_bitmask(weight) and bool(self._read(weight)[1].all())

    def _dtype(self, weight: StoredWeight) -> torch.dtype:
        planned = self._plans[weight.name]
        return weight.own_dtype(self._folder.dtype if planned is None else planned.dtype)

    def _can_be_packed(self, weight: StoredWeight) -> bool:
        parameter = self._names.parameter(weight.name)
        if parameter is None:
            return False
        module = self.model.get_submodule(parameter.rpartition(".")[0])
        free = is_free_linear(self.model, module, parameter)
        return free and not self._folder.rules.ignores(module, weight.module)
