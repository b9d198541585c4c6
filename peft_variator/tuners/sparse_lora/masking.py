"""The mask M of a module: read from its zeros or stored with the adapter, and checked before it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from .config import SparseLoraConfig
from .effective import kept_weights
from .low_rank import LowRankLayer
from .masks import fingerprint, matches_fingerprint, pack_mask, unpack_mask
from .merging import merge_update


__all__ = ["MaskedLayer"]


class MaskedLayer(LowRankLayer):
    """A `LowRankLayer` whose adapters each have a mask M, True where a weight was not pruned."""

    other_param_names = (*LowRankLayer.other_param_names, "sparse_low_rank_mask", "sparse_low_rank_source")

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__(base_layer, module_name)
        self.sparse_low_rank_mask = BufferDict(persistent=True)  # packed M, for adapters that store theirs
        self.sparse_low_rank_source = BufferDict(persistent=True)  # fingerprint of the W it is for, 0 until attached
        # Only while merged: the packed M, which can't be read from the merged weight, and, for stored masks, W itself:
        # the merged weight has lost its pruned part, and the fingerprint would not know a W that has been rounded.
        self.sparse_low_rank_merged_mask: torch.Tensor | None
        self.sparse_low_rank_dense_weight: torch.Tensor | None
        self.register_buffer("sparse_low_rank_merged_mask", None, persistent=False)
        self.register_buffer("sparse_low_rank_dense_weight", None, persistent=False)
        self._checked: set[tuple[str, ...]] = set()  # groups of adapters whose stored masks were found to fit
        self.register_load_state_dict_post_hook(_check_loaded_masks)

    def update_layer(self, adapter_name: str, config: SparseLoraConfig, rank: int, alpha: float) -> None:
        """Add an adapter of this rank to the layer, or replace it by a new one."""
        if config.mask == "stored":
            # zeros for now, so that a saved mask finds its place when a state dict is loaded
            packed_columns = -(-self.in_features // 8)
            self.sparse_low_rank_mask[adapter_name] = torch.zeros(self.out_features, packed_columns, dtype=torch.uint8)
            self.sparse_low_rank_source[adapter_name] = torch.zeros_like(fingerprint(torch.zeros(1, 1)))
        self._checked.clear()
        super().update_layer(adapter_name, config, rank, alpha)

    def get_mask(self, adapter_name: str) -> torch.Tensor:
        """M of an adapter, bool (out_features, in_features)."""
        with self._onloaded():
            return self._kept([adapter_name])

    def attach_mask(self, adapter_name: str, mask: torch.Tensor | None) -> None:
        """Store M of an adapter with `mask="stored"`, together with a fingerprint of the weight it is for.

        Args:
            mask: bool, of the shape of the base layer's own weight; None keeps every weight.

        Raises:
            TypeError: the mask is not bool.
            ValueError: its shape is another, the adapter stores no mask, or an adapter is merged.
        """
        if adapter_name not in self.sparse_low_rank_mask:
            raise ValueError(
                f"Adapter {adapter_name!r} of {self.module_name!r} stores no mask: it was made with mask='weight', "
                "which reads M from the zeros of the base weight. Create it with SparseLoraConfig(mask='stored')."
            )
        if self.merged:
            raise ValueError(f"Unmerge {self.merged_adapters} of {self.module_name!r} before attaching a mask.")
        with self._onloaded():
            weight = self.layout.weight(self._base_tensors())
            matrix = torch.ones_like(weight, dtype=torch.bool) if mask is None else self._mask_matrix(mask)
            self.sparse_low_rank_mask[adapter_name] = pack_mask(matrix.to(weight.device))
            self.sparse_low_rank_source[adapter_name] = fingerprint(weight)
        self._checked.clear()

    def _mask_matrix(self, mask: torch.Tensor) -> torch.Tensor:
        if mask.dtype != torch.bool:
            raise TypeError(f"The mask of {self.module_name!r} must be bool (True = kept), not {mask.dtype}.")
        matrix = self.layout.flatten(mask)
        if matrix.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"The mask of {self.module_name!r} is {tuple(matrix.shape)} as (out_features, in_features), but the "
                f"base weight is {(self.out_features, self.in_features)}. Give it the shape of the layer's own weight."
            )
        return matrix

    def masks_nothing(self, adapter_name: str) -> bool:
        """Whether M of the adapter keeps every weight. A weight that is not there yet (meta device) gives False."""
        with self._onloaded():
            return not self._is_meta() and bool(self._kept([adapter_name]).all())

    def _is_meta(self) -> bool:
        return any(tensor.is_meta for tensor in self._base_tensors())

    def _kept(self, adapter_names: Sequence[str]) -> torch.Tensor:
        packed_mask = self._packed_mask(adapter_names)
        if packed_mask is None:
            packed_mask = self.sparse_low_rank_merged_mask
        return kept_weights(packed_mask, self.layout_name, self._base_tensors())

    def _packed_mask(self, adapter_names: Sequence[str]) -> torch.Tensor | None:
        """The stored mask that these adapters share, checked on first use; None if it is read from the base weight."""
        stored = [name for name in adapter_names if name in self.sparse_low_rank_mask]
        if not stored:
            return None
        if tuple(adapter_names) not in self._checked:
            self._check_masks(tuple(adapter_names))
        return self.sparse_low_rank_mask[stored[0]]

    @torch.compiler.disable  # looks at values; with fullgraph=True, run one forward before compiling
    def _check_masks(self, adapter_names: tuple[str, ...]) -> None:
        packed = []
        for name in adapter_names:
            if name in self.sparse_low_rank_mask:
                self._check_source(name)
                packed.append(self.sparse_low_rank_mask[name])
            else:
                packed.append(pack_mask(self._kept([name])))
        if not all(torch.equal(packed[0], other) for other in packed[1:]):
            raise ValueError(
                f"The adapters {list(adapter_names)} have different masks in {self.module_name!r} and cannot be "
                "active or merged together. Use one of them at a time."
            )
        self._checked.add(adapter_names)

    def _check_source(self, adapter_name: str) -> None:
        source = self.sparse_low_rank_source[adapter_name]
        if not source.any():
            raise ValueError(
                f"Adapter {adapter_name!r} was made with mask='stored', but {self.module_name!r} has no mask yet. "
                "Call `attach_masks(model, masks, adapter_name)` or load a saved adapter."
            )
        if not matches_fingerprint(source, self._original_weight()):
            raise ValueError(
                f"The stored mask of adapter {adapter_name!r} was made for another base: the weight of "
                f"{self.module_name!r} is not the one it came from. Load the adapter on the dense model that was "
                "pruned, or prune this one and attach its masks."
            )

    def _original_weight(self) -> torch.Tensor:
        """W, (out, in), as it was before merging."""
        if self.sparse_low_rank_dense_weight is not None:
            return self.sparse_low_rank_dense_weight
        weight = self.layout.weight(self._base_tensors()).detach()
        if self.sparse_low_rank_merged_mask is None:
            return weight
        kept = unpack_mask(self.sparse_low_rank_merged_mask, self.in_features)
        return merge_update(weight, -self._update(self.merged_adapters), kept)


def _check_loaded_masks(layer: MaskedLayer, incompatible_keys: object) -> None:
    """After a state dict was loaded: a mask for another base raises now and not in the first forward."""
    layer._checked.clear()
    attached = [name for name, source in layer.sparse_low_rank_source.items() if source.any()]
    if not attached:
        return
    with layer._onloaded():
        for adapter_name in attached:
            if not layer._is_meta():
                layer._check_masks((adapter_name,))
