"""The layers of SparseLoRA: what a masked update computes, and merging it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.utils.checkpoint import checkpoint

from .functional import effective_weight, masked_linear
from .masking import MaskedLayer
from .masks import pack_mask
from .merging import merge_update


__all__ = ["SparseLoraConv2d", "SparseLoraLayer", "SparseLoraLinear"]


class SparseLoraLayer(MaskedLayer):
    """A base layer with weight W, computed with (W + Σ s·B·A) ⊙ M over the active adapters (arXiv 2404.02424).

    The adapters that are active or merged together must have the same mask.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(…, in) -> (…, out) with the active adapters; the base layer as it is when they are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.sparse_low_rank_A]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if self.training and torch.is_grad_enabled() and self._is_offloaded():
            raise RuntimeError(
                f"The weight of {self.module_name!r} is offloaded, and above offloaded weights nothing is trained: "
                "autograd would keep every weight that is brought in until the backward, and offloading would save no "
                "memory. Load the model without offloading; for inference call model.eval()."
            )
        result = self._masked_forward(x, active)
        if self.base_layer is not self.get_base_layer():
            # another tuner's layer in between, say LoRA's: add what it adds to the base
            result = result + self.base_layer(x, *args, **kwargs) - self.get_base_layer()(x)
        return result

    def _masked_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how its effective weight is applied.")

    def _compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The dtype the base layer would compute in: autocast's, else that of its weight."""
        dtype = self._base_tensors()[0].dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return dtype

    def _recomputes(self, adapter_names: list[str]) -> bool:
        return any(self.recompute[name] for name in adapter_names)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """(s·B·A) ⊙ M of one adapter, (out_features, in_features), in float32 or better."""
        with self._onloaded():
            return torch.where(self._kept([adapter_name]), self._update([adapter_name]), 0.0)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put (W + Σ s·B·A) ⊙ M into the base layer. Its zeros are those of M, and +0.0.

        Args:
            safe_merge: check the result before anything is written.
            adapter_names: the adapters to merge, by default the active ones.

        Raises:
            ValueError: the adapters have different masks; or, with `safe_merge`, the result is not finite.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sparse_low_rank_A]
        if not new:
            return
        # from the original weight, so that several adapters are rounded once and not one after the other
        names = self.merged_adapters + new
        weight, kept, update = self._original_weight(), self._kept(names), self._update(names)
        merged = merge_update(weight, update, kept)
        if safe_merge and not (update.isfinite().all() and merged.isfinite().all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: the merged "
                f"weight of {self.module_name!r} is not finite. The base weight was left as it was."
            )
        self.sparse_low_rank_dense_weight = weight.clone() if self._packed_mask(names) is not None else None
        self.sparse_low_rank_merged_mask = pack_mask(kept)
        self.layout.write(self.get_base_layer(), merged)
        self.merged_adapters = names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base layer.

        Every zero comes back exactly and the other weights to the rounding of their dtype; with a stored mask, all of
        the dense W bit for bit.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.layout.write(self.get_base_layer(), self._original_weight())
        self.sparse_low_rank_merged_mask = self.sparse_low_rank_dense_weight = None
        self.merged_adapters = []


class SparseLoraLinear(SparseLoraLayer):
    """SparseLoRA on a linear layer: nn.Linear, Conv1D, or one registered with `register_layout`."""

    def _masked_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        x = self._cast_input_dtype(x, self._compute_dtype(x))
        with self._onloaded():
            packed_mask = self._packed_mask(adapter_names)
            a, b, scales = self._factors(adapter_names)
            bias: torch.Tensor | None = self.bias
            return masked_linear(
                x=x,
                a=a,
                b=b,
                scales=scales,
                bias=None if bias is None else bias.to(x.dtype),
                packed_mask=packed_mask,
                layout=self.layout_name,
                base=self._base_tensors(),
                recompute=self._recomputes(adapter_names),
            )


class SparseLoraConv2d(SparseLoraLayer):
    """SparseLoRA on a convolution, such as the patch embedding of a vision transformer."""

    def _masked_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        x = self._cast_input_dtype(x, self._compute_dtype(x))
        if self._recomputes(adapter_names) and torch.is_grad_enabled():
            # stops as soon as the effective weight is there again, before the convolution
            return checkpoint(self._convolve, x, adapter_names, use_reentrant=False, preserve_rng_state=False)
        return self._convolve(x, adapter_names)

    def _convolve(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """The base layer's own convolution, padding included, with the effective weight."""
        base_layer = self.get_base_layer()
        assert isinstance(base_layer, nn.Conv2d)  # what the model makes this layer for
        with self._onloaded():
            packed_mask = self._packed_mask(adapter_names)
            a, b, scales = self._factors(adapter_names)
            weight = effective_weight(a, b, scales, packed_mask, self.layout_name, self._base_tensors(), x.dtype)
            return base_layer._conv_forward(x, weight.reshape(base_layer.weight.shape), base_layer.bias)
