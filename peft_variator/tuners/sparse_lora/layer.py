"""The layers of SparseLoRA: low-rank updates under a mask, and merging them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...adapter_state import ExactlyLoadedLayer
from ...bitmask import pack_mask, unpack_mask
from ...compat import BufferDict, is_quantized_tensor, repeated_by_reentrant_checkpoint
from .base_weight import WeightLayout, computed_weight_error, find_layout, get_layout, has_computed_weight
from .config import SparseLoraConfig
from .fingerprints import fingerprint, matches_fingerprint
from .functional import MaskedWeight, effective_weight, masked_linear, merge_update, sum_updates


__all__ = ["SparseLoraConv2d", "SparseLoraLayer", "SparseLoraLinear"]


class SparseLoraLayer(nn.Module, ExactlyLoadedLayer):
    """A base layer with weight W, computed with (W + Σ s·B·A) ⊙ M over the active adapters (arXiv 2404.02424).

    Weights are matrices of shape (out_features, in_features) here, whatever shape the base layer keeps them in; for a
    convolution, in_features is in_channels / groups · kernel height · kernel width. M is True where a weight was not
    pruned. The adapters that are active or merged together must have the same mask.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        module_name: its name in the model, for messages.

    Raises:
        TypeError: the base layer has no floating point weight that can be adapted.
        ValueError: its weight is computed from others.
    """

    adapter_layer_names: tuple[str, ...] = ("sparse_low_rank_A", "sparse_low_rank_B")
    other_param_names: tuple[str, ...] = (
        "rank",
        "scaling",
        "initial_scaling",
        "recompute",
        "sparse_low_rank_mask",
        "sparse_low_rank_source",
    )

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        layout = find_layout(self.get_base_layer())
        if layout is None or not _is_plain(layout.tensors(self.get_base_layer())[0]):
            weight = f" with a weight of type {type(self.get_base_layer().weight).__name__}" if layout else ""
            raise TypeError(
                f"SparseLoRA cannot adapt the module {module_name!r} of type {type(self.get_base_layer()).__name__}"
                f"{weight}. It adapts nn.Linear, Conv1D and nn.Conv2d with floating point weights, and classes "
                "registered with `register_layout`; not quantized layers, not those with a forward of their own (as "
                "routers of experts) and not the out_proj of nn.MultiheadAttention, whose weight is read without a "
                "call. Exclude it with `exclude_modules`."
            )
        if has_computed_weight(self.get_base_layer()):
            raise computed_weight_error(module_name, "what is merged into it")
        self.layout_name = layout.name
        self.out_features, self.in_features = layout.shape(self._base_tensors())
        self.sparse_low_rank_A = nn.ParameterDict()  # (rank, in_features) each
        self.sparse_low_rank_B = nn.ParameterDict()  # (out_features, rank) each
        self.sparse_low_rank_mask = BufferDict(persistent=True)  # packed M, for adapters that store theirs
        self.sparse_low_rank_source = BufferDict(persistent=True)  # fingerprint of the W it is for, 0 until attached
        # Only while merged: the packed M, which can't be read from the merged weight, and, for stored masks, W itself:
        # the merged weight has lost its pruned part, and the fingerprint would not know a W that has been rounded.
        self.sparse_low_rank_merged_mask: Tensor | None
        self.sparse_low_rank_dense_weight: Tensor | None
        self.register_buffer("sparse_low_rank_merged_mask", None, persistent=False)
        self.register_buffer("sparse_low_rank_dense_weight", None, persistent=False)
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}  # s
        self.initial_scaling: dict[str, float] = {}  # s as the config has it
        self._merged_scaling: list[float] = []  # s of the merged adapters when they were merged
        self.recompute: dict[str, bool] = {}
        self._checked: set[tuple[str, ...]] = set()  # groups of adapters whose stored masks were found to fit
        self._to_repeat: dict[tuple[str, ...], int] = {}  # see _check_repetition
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.register_load_state_dict_post_hook(_check_loaded_masks)

    @property
    def layout(self) -> WeightLayout:
        """How the base layer keeps its weight."""
        return get_layout(self.layout_name)

    def update_layer(self, adapter_name: str, config: SparseLoraConfig, rank: int, alpha: float) -> None:
        """Add an adapter of this rank to the layer, or replace it by a new one."""
        if config.mask == "stored":
            # zeros for now, so that a saved mask finds its place when a state dict is loaded
            packed_columns = -(-self.in_features // 8)
            self.sparse_low_rank_mask[adapter_name] = torch.zeros(self.out_features, packed_columns, dtype=torch.uint8)
            self.sparse_low_rank_source[adapter_name] = torch.zeros_like(fingerprint(torch.zeros(1, 1)))
        self._checked.clear()
        self.rank[adapter_name] = rank
        self.scaling[adapter_name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.initial_scaling[adapter_name] = self.scaling[adapter_name]
        self.recompute[adapter_name] = config.recompute
        self.sparse_low_rank_A[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.sparse_low_rank_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, rank))
        self._init_parameters(adapter_name, config.init_lora_weights)
        with self.as_new():
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _init_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.sparse_low_rank_A[adapter_name], std=1 / self.rank[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.sparse_low_rank_A[adapter_name], a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.sparse_low_rank_B[adapter_name], a=math.sqrt(5))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make s of an adapter its initial one times `scale`; nothing where the layer has no such adapter."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply s of all active adapters by `scale`."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of all active adapters by `scale`; None makes it the initial one again."""
        for adapter in self._active_here():
            self.scaling[adapter] = self.initial_scaling[adapter] if scale is None else self.scaling[adapter] / scale

    def _active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.sparse_low_rank_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, in) -> (…, out) with the active adapters; the base layer as it is when they are disabled or merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._active_here()
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if self.training and torch.is_grad_enabled() and self._is_offloaded():
            raise RuntimeError(
                f"The weight of {self.module_name!r} is offloaded, and above offloaded weights nothing is trained: "
                "autograd would keep every weight that is brought in until the backward, and offloading would save no "
                "memory. Load the model without offloading; for inference call model.eval()."
            )
        if self.training and not torch.compiler.is_compiling():
            self._check_repetition(tuple(active))
        result = self._masked_forward(x, active)
        if self.base_layer is not self.get_base_layer():
            # another tuner's layer in between, say LoRA's: add what it adds to the base
            result = result + self.base_layer(x, *args, **kwargs) - self.get_base_layer()(x)
        return result

    def _check_repetition(self, adapter_names: tuple[str, ...]) -> None:
        """Raise if a reentrant checkpoint repeats a forward with other adapters than those it was made with.

        Such a checkpoint makes its forward without gradients, and repeats it in the backward. So the forwards without
        gradients are counted for each group of adapters; checkpoints of the other kind look at `_identity`.
        """
        if not torch.is_grad_enabled():
            self._to_repeat[adapter_names] = self._to_repeat.get(adapter_names, 0) + 1
        elif self._to_repeat and repeated_by_reentrant_checkpoint():
            left = self._to_repeat.pop(adapter_names, 0)
            if left > 1:
                self._to_repeat[adapter_names] = left - 1
            elif left == 0 and self._to_repeat:
                made_with = [list(names) for names in self._to_repeat]
                self._to_repeat.clear()
                raise RuntimeError(
                    f"A checkpointed forward of {self.module_name!r} is repeated in the backward with the adapters "
                    f"{list(adapter_names)}, but was made with {made_with}: the gradients would be wrong. Switch "
                    "adapters after the backward."
                )

    def _identity(self, adapter_names: list[str]) -> int:
        """A number that is the same only for the same adapters, scaled alike."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return 0
        return hash(tuple((name, self.scaling[name]) for name in adapter_names)) & 0x7FFFFFFF

    def _masked_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how its effective weight is applied.")

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype the base layer would compute in: autocast's, else that of its weight."""
        dtype = self._base_tensors()[0].dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return dtype

    def _recomputes(self, adapter_names: list[str]) -> bool:
        return any(self.recompute[name] for name in adapter_names)

    def _masked_weight(self, adapter_names: list[str]) -> MaskedWeight:
        """What the effective weight of these adapters is made of."""
        packed_mask = self._packed_mask(adapter_names)
        return MaskedWeight(*self._factors(adapter_names), packed_mask, self.layout_name, self._base_tensors())

    def _factors(self, adapter_names: Sequence[str]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """A, B and s of each of these adapters."""
        a = [self.sparse_low_rank_A[name] for name in adapter_names]
        b = [self.sparse_low_rank_B[name] for name in adapter_names]
        return a, b, [self.scaling[name] for name in adapter_names]

    def _update(self, adapter_names: Sequence[str]) -> Tensor:
        """Σ s·B·A, (out, in), in float32 or better."""
        return sum_updates(*self._factors(adapter_names), dtype=self.base_dtype)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """(s·B·A) ⊙ M of one adapter, (out_features, in_features), in float32 or better."""
        with self._onloaded():
            return torch.where(self._kept([adapter_name]), self._update([adapter_name]), 0.0)

    def get_mask(self, adapter_name: str) -> Tensor:
        """M of an adapter, bool (out_features, in_features)."""
        with self._onloaded():
            return self._kept([adapter_name])

    def base_weight(self) -> Tensor | None:
        """W, (out_features, in_features), or None where it is not in memory as a whole: on meta, or sharded."""
        with self._onloaded():
            weight = None if self._is_meta() else self.layout.weight(self._base_tensors()).detach()
            whole = weight is not None and weight.shape == (self.out_features, self.in_features)
            return weight if whole else None

    def masks_nothing(self, adapter_name: str) -> bool:
        """Whether M of the adapter keeps every weight. A weight that is not there yet (meta device) gives False."""
        with self._onloaded():
            return not self._is_meta() and bool(self._kept([adapter_name]).all())

    def attach_mask(self, adapter_name: str, mask: Tensor | None) -> None:
        """Store M of an adapter with `mask="stored"`, together with a fingerprint of the weight it is for.

        Args:
            mask: bool, of the shape of the base layer's own weight; None keeps every weight.

        Raises:
            TypeError: the mask is not bool.
            ValueError: its shape is another, the adapter stores no mask, its masks are offloaded, or an adapter is
                merged.
        """
        if adapter_name not in self.sparse_low_rank_mask:
            raise ValueError(
                f"Adapter {adapter_name!r} of {self.module_name!r} stores no mask: it was made with mask='weight', "
                "which reads M from the zeros of the base weight. Create it with SparseLoraConfig(mask='stored')."
            )
        if self.merged:
            raise ValueError(f"Unmerge {self.merged_adapters} of {self.module_name!r} before attaching a mask.")
        masks = self.sparse_low_rank_mask
        if has_offloaded_params(masks) and masks[adapter_name].is_meta:
            raise ValueError(
                f"The stored masks of {self.module_name!r} are offloaded, and another one would be lost with the next "
                "forward. Attach masks first, and offload the model after it."
            )
        with self._onloaded():
            weight = self.layout.weight(self._base_tensors())
            matrix = torch.ones_like(weight, dtype=torch.bool) if mask is None else self._mask_matrix(mask)
            self.sparse_low_rank_mask[adapter_name] = pack_mask(matrix.to(weight.device))
            self.sparse_low_rank_source[adapter_name] = fingerprint(weight)
        self._checked.clear()

    def _mask_matrix(self, mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            raise TypeError(f"The mask of {self.module_name!r} must be bool (True = kept), not {mask.dtype}.")
        matrix = self.layout.flatten(mask)
        if matrix.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"The mask of {self.module_name!r} is {tuple(matrix.shape)} as (out_features, in_features), but the "
                f"base weight is {(self.out_features, self.in_features)}. Give it the shape of the layer's own weight."
            )
        return matrix

    def _kept(self, adapter_names: Sequence[str]) -> Tensor:
        packed_mask = self._packed_mask(adapter_names)
        if packed_mask is None:
            packed_mask = self.sparse_low_rank_merged_mask
        if packed_mask is None:
            return self.layout.kept(self._base_tensors())
        return unpack_mask(packed_mask, self.in_features)

    def _packed_mask(self, adapter_names: Sequence[str]) -> Tensor | None:
        """The stored mask that these adapters share, checked on first use; None if it is read from the base weight."""
        stored = [name for name in adapter_names if name in self.sparse_low_rank_mask]
        if not stored:
            return None
        if tuple(adapter_names) not in self._checked:
            if torch.jit.is_tracing():
                raise RuntimeError(
                    f"The stored mask of {self.module_name!r} has not been compared with its base weight yet, which "
                    "torch.jit.trace would record. Run one forward of the model before it is traced."
                )
            self._check_masks(tuple(adapter_names))
        return self.sparse_low_rank_mask[stored[0]]

    @torch.compiler.disable  # looks at values; with fullgraph=True, run one forward before compiling
    def _check_masks(self, adapter_names: tuple[str, ...]) -> None:
        packed = []
        for name in adapter_names:
            if name in self.sparse_low_rank_mask:
                self.check_source(name, self.sparse_low_rank_source[name])
                packed.append(self.sparse_low_rank_mask[name])
            else:
                packed.append(pack_mask(self._kept([name])))
        if not all(torch.equal(packed[0], other) for other in packed[1:]):
            raise ValueError(
                f"The adapters {list(adapter_names)} have different masks in {self.module_name!r} and cannot be "
                "active or merged together. Use one of them at a time."
            )
        self._checked.add(adapter_names)

    def check_source(self, adapter_name: str, source: Tensor) -> None:
        """Raise unless `source` is the fingerprint of this layer's base weight.

        Raises:
            ValueError: it is that of another weight, or of none; the message names the adapter and the module.
        """
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

    def _original_weight(self) -> Tensor:
        """W, (out, in), as it was before merging."""
        if self.sparse_low_rank_dense_weight is not None:
            return self.sparse_low_rank_dense_weight
        weight = self.layout.weight(self._base_tensors()).detach()
        if self.sparse_low_rank_merged_mask is None:
            return weight
        kept = unpack_mask(self.sparse_low_rank_merged_mask, self.in_features)
        return merge_update(weight, -self._merged_update(self.merged_adapters), kept)

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
        weight, kept, merged = self._merged(names, safe_merge)
        self.sparse_low_rank_dense_weight = weight.clone() if self._packed_mask(names) is not None else None
        self.sparse_low_rank_merged_mask = pack_mask(kept)
        self.layout.write(self.get_base_layer(), merged)
        self.merged_adapters, self._merged_scaling = names, self._scaling_of(names)

    def _merged_update(self, names: list[str]) -> Tensor:
        """Σ s·B·A of adapters as they are merged, (out, in), in float32 or better."""
        a, b, _ = self._factors(names)
        return sum_updates(a, b, self._scaling_of(names), self.base_dtype)

    def _scaling_of(self, names: list[str]) -> list[float]:
        """s of adapters as they are merged; of those that are, which come first, as it was then."""
        return self._merged_scaling + [self.scaling[name] for name in names[len(self._merged_scaling) :]]

    @torch.no_grad()
    def check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raise what `merge` with these arguments would raise, and write nothing."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = self.merged_adapters + [
            name for name in wanted if name in self.sparse_low_rank_A and name not in self.merged_adapters
        ]
        if safe_merge and names:
            self._merged(names, safe_merge)
        elif names:
            self._packed_mask(names)

    def _merged(self, names: list[str], safe_merge: bool) -> tuple[Tensor, Tensor, Tensor]:
        """W, M and (W + Σ s·B·A) ⊙ M of these adapters, (out, in) each."""
        weight, kept = self._original_weight(), self._kept(names)
        update = self._merged_update(names)
        merged = merge_update(weight, update, kept)
        if safe_merge and not (update.isfinite().all() and merged.isfinite().all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: the merged "
                f"weight of {self.module_name!r} is not finite. The base weight was left as it was."
            )
        return weight, kept, merged

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
        self.merged_adapters, self._merged_scaling = [], []

    def _base_tensors(self) -> list[Tensor]:
        return self.layout.tensors(self.get_base_layer())

    def _is_meta(self) -> bool:
        return any(tensor.is_meta for tensor in self._base_tensors())

    def _onloaded(self) -> AbstractContextManager[Any]:
        """Brings in what accelerate has offloaded: its hooks sit on forwards that are not called here."""
        if not self._is_offloaded():
            return nullcontext()
        stack = ExitStack()
        for module in self._modules_with_tensors():
            stack.enter_context(align_module_device(module))
        return stack

    def _is_offloaded(self) -> bool:
        return any(
            tensor is not None and tensor.is_meta
            for module in self._modules_with_tensors()
            for tensor in (*module._parameters.values(), *module._buffers.values())
        )

    def _modules_with_tensors(self) -> tuple[nn.Module, ...]:
        masks = self.sparse_low_rank_mask, self.sparse_low_rank_source  # with offload_buffers=True, too
        return self.get_base_layer(), self.sparse_low_rank_A, self.sparse_low_rank_B, *masks

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base layer's weight."""
        return self._base_tensors()[0].dtype

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        """PEFT looks for a `weight`, which packed layers don't have, and puts adapters of offloaded ones on meta."""
        with self._onloaded():
            tensor = self._base_tensors()[0]
            return tensor.device, tensor.dtype if self.is_new else None


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight consists of the floating point numbers that it says it does."""
    return weight.is_floating_point() and not is_quantized_tensor(weight)


class SparseLoraLinear(SparseLoraLayer):
    """SparseLoRA on a linear layer: nn.Linear, Conv1D, or one registered with `register_layout`."""

    def _masked_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        x = self._cast_input_dtype(x, self._compute_dtype(x))
        with self._onloaded():
            bias: Tensor | None = self.bias
            return masked_linear(
                x,
                self._masked_weight(adapter_names),
                None if bias is None else bias.to(x.dtype),
                self._recomputes(adapter_names),
                self._identity(adapter_names),
            )


class SparseLoraConv2d(SparseLoraLayer):
    """SparseLoRA on a convolution, such as the patch embedding of a vision transformer."""

    def _masked_forward(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        x = self._cast_input_dtype(x, self._compute_dtype(x))
        if self._recomputes(adapter_names) and torch.is_grad_enabled():
            # stops as soon as the effective weight is there again, before the convolution
            return checkpoint(self._convolve, x, adapter_names, use_reentrant=False, preserve_rng_state=False)
        return self._convolve(x, adapter_names)

    def _convolve(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        """The base layer's own convolution, padding included, with the effective weight."""
        base_layer = self.get_base_layer()
        assert isinstance(base_layer, nn.Conv2d)  # what the model makes this layer for
        with self._onloaded():
            weight = effective_weight(self._masked_weight(adapter_names), x.dtype, self._identity(adapter_names))
            return base_layer._conv_forward(x, weight.reshape(base_layer.weight.shape), base_layer.bias)


def _check_loaded_masks(layer: SparseLoraLayer, incompatible_keys: object) -> None:
    """After a state dict was loaded: a mask for another base raises now and not in the first forward."""
    layer._checked.clear()
    attached = [name for name, source in layer.sparse_low_rank_source.items() if source.any()]
    if not attached:
        return
    with layer._onloaded():
        for adapter_name in attached:
            if not layer._is_meta():
                layer._check_masks((adapter_name,))
