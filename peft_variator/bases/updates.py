"""The update of one layer, as an adapter's file has it, and merging it into the weight that a base's file has."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tuners.sparse_lora.base_weight import WeightLayout
from ..tuners.sparse_lora.functional import merge_update, sum_updates
from ..tuners.sparse_lora.masks import matches_fingerprint
from .checkpoint import CheckpointError, StoredTensor
from .layout import LayoutError, PackedWeight, gather_kept, pack, unpack, unpack_mask
from .pieces import packed_names, packed_specs
from .shards import Piece
from .stored import StoredWeight
from .writer import TensorSpec


__all__ = ["LayerUpdate", "MergeJob", "merged_piece"]


@dataclass(frozen=True)
class LayerUpdate:
    """The tensors of one adapted layer.

    Args:
        module: its name in the model.
        layout: how it keeps its weight.
        a: A, (rank, in_features).
        b: B, (out_features, rank).
        scale: s.
        mask: M, uint8 (out_features, ceil(in_features / 8)), where the adapter stores it.
        source: the fingerprint of the weight that the mask is for.
    """

    module: str
    layout: WeightLayout
    a: StoredTensor
    b: StoredTensor
    scale: float
    mask: StoredTensor | None
    source: StoredTensor | None

    @property
    def parts(self) -> list[StoredTensor]:
        """Its tensors."""
        return [part for part in (self.a, self.b, self.mask, self.source) if part is not None]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.a.shape[1]

    def stored_mask(self) -> Tensor | None:
        """M, bool (out_features, in_features), where the adapter stores it.

        Raises:
            CheckpointError: the adapter was saved before it had masks.
        """
        if self.mask is None or self.source is None:
            return None
        if not self.source.read().any():
            raise CheckpointError(
                f"{self.mask}: the adapter was made with mask='stored' and saved before it had masks. Call "
                "attach_masks(model, masks) and save it again."
            )
        return unpack_mask(self.mask.read(), self.in_features)

    def stores_two_four(self) -> bool:
        """Whether the stored mask prunes in a 2:4 pattern; a mask that keeps everything prunes nothing.

        Raises:
            CheckpointError: the mask prunes in another pattern; the message names tensor, row and columns.
        """
        kept = self.stored_mask()
        if kept is None or kept.all():
            return False
        assert self.mask is not None  # there is one
        try:
            pack(kept.to(torch.bfloat16), self.mask.name)
        except LayoutError as error:
            raise CheckpointError(
                f"{self.mask.file}: as a mask, {error} Only 2:4 can be packed: merge to the dense form, or attach 2:4 "
                "masks."
            ) from error
        return True

    def merge(self, weight: Tensor, kept: Tensor) -> Tensor:
        """(W + s·B·A) ⊙ M, summed in float32 or better and rounded once; its zeros are those of M, and +0.0.

        Args:
            weight: W, (out_features, in_features).
            kept: the places of W that are not pruned, bool; a stored mask counts instead of it.

        Raises:
            CheckpointError: the stored mask was made for another weight, or the result is not finite.
        """
        stored = self.stored_mask()
        if stored is not None and self.source is not None and not matches_fingerprint(self.source.read(), weight):
            raise CheckpointError(
                f"{self.mask}: the mask was made for another base: the weight of {self.module} is not the one it came "
                "from. Merge into the dense model that was pruned."
            )
        update = sum_updates([self.a.read()], [self.b.read()], [self.scale], weight.dtype)
        merged = merge_update(weight, update, kept if stored is None else stored)
        if not (update.isfinite().all() and merged.isfinite().all()):
            raise CheckpointError(
                f"{self.a}: the merged weight of {self.module} is not finite. The adapter seems to be broken."
            )
        return merged


@dataclass(frozen=True)
class MergeJob:
    """How one weight is merged.

    Args:
        weight: W, in any layout.
        update: what to add.
        dtype: dtype of the result.
        from_packed: take the mask from the bitmask, which also keeps zeros, and not from the zeros.
        to_packed: write the packed form.
        unmasked: where the names of weights go of which the mask keeps all.
    """

    weight: StoredWeight
    update: LayerUpdate
    dtype: torch.dtype
    from_packed: bool
    to_packed: bool
    unmasked: list[str] = field(default_factory=list)

    def make(self) -> dict[str, Tensor]:
        """The merged tensors by name."""
        bitmask, matrix = self._read()
        kept = matrix != 0 if bitmask is None else unpack_mask(bitmask, self.update.in_features)
        if self.update.mask is None and kept.all():
            self.unmasked.append(self.weight.name)
        merged = self.update.merge(matrix, kept)
        if not self.to_packed:
            dense = torch.empty(self.weight.size(), dtype=self.dtype)
            self.update.layout.flatten(dense).copy_(merged)  # a view of it
            return {self.weight.name: dense}
        if bitmask is None or self.update.mask is not None:
            return packed_names(self.weight, pack(merged, self.weight.name))
        shape = torch.tensor([[size] for size in merged.shape])
        return packed_names(self.weight, PackedWeight(gather_kept(merged, bitmask), bitmask, shape))

    def _read(self) -> tuple[Tensor | None, Tensor]:
        """The bitmask of a packed weight, and the weight, (out_features, in_features)."""
        if not self.from_packed:
            return None, self.update.layout.flatten(self.weight.read_dense(self.dtype))
        packed = self.weight.read_packed(self.dtype)
        return packed.bitmask, unpack(packed.compressed, packed.bitmask, self.update.in_features)


def merged_piece(job: MergeJob) -> Piece:
    """A piece that merges one weight."""
    dense = {job.weight.name: TensorSpec(job.dtype, job.weight.size())}
    specs = packed_specs(job.weight, job.dtype) if job.to_packed else dense
    return Piece(job.weight.sources, specs, job.make)
