"""The tuner model of SparseLoRA: which modules it adapts, and how masks reach them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...adapter_state import AdapterStateError, TidyTuner, check_adapter_state, modules_in_layers, modules_saved_whole
from ...compat import include_all_linear_layers, keep_from_fused_operator
from ...field_types import check_memory, name_some
from ...offloading import refuse_disk_offload, refuse_rewriting
from ...saved_config import NamedConfigs
from .base_weight import find_layout, has_forward_of_its_own
from .config import SparseLoraConfig
from .fingerprints import base_fingerprint, same_base
from .layer import SparseLoraConv2d, SparseLoraLayer, SparseLoraLinear


__all__ = ["SparseLoraModel", "attach_masks"]

# Layers whose weights a model reads without calling them, by the name of their parent's class. The mixers of Mamba's
# kind call x_proj and out_proj on CPUs, where only dt_proj is read; with the fused kernels they are read as well.
_NEVER_CALLED: dict[str, tuple[str, ...]] = {
    "BambaMixer": ("out_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DetrMHAttentionMap": ("k_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("dense",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "Zamba2MambaMixer": ("out_proj",),
}


class SparseLoraModel(TidyTuner):
    """LoRA under the mask of a pruned model (He et al. 2024, arXiv 2404.02424).

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_variator import SparseLoraConfig

        >>> model = get_peft_model(pruned_model, SparseLoraConfig(r=8))
        >>> ...  # train
        >>> merged = model.merge_and_unload()  # as sparse as before
        ```
    """

    # Not "sparse_lora_": PEFT and others look for prefixes as substrings, and that one contains LoRA's "lora_". The
    # prefix is the name of the method and "_", as transformers' `delete_adapter` expects.
    prefix = "sparse_low_rank_"
    tuner_layer_cls = SparseLoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: SparseLoraConfig | dict[str, SparseLoraConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        # What the model carries already, such as a task's LoRA, belongs to the base model, even under the same name.
        configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
        self.carried_configs = {n: config for n, config in configs.items() if not isinstance(config, SparseLoraConfig)}
        self.carried_wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        if configs:
            self.peft_config = {n: config for n, config in configs.items() if isinstance(config, SparseLoraConfig)}
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if self.carried_configs:
            configs = NamedConfigs({**self.carried_configs, **self.peft_config})
            model.peft_config = configs  # type: ignore[assignment]  # as PEFT does

    def _prepare_adapter_config(self, peft_config: SparseLoraConfig, model_config: dict[str, Any]) -> SparseLoraConfig:
        """Without target modules: all linear layers, the default of the paper and no matter what the architecture."""
        if peft_config.target_modules is None:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
        return peft_config

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        """Resolve "all-linear" here, before PEFT does; see `_all_linear`."""
        target_modules = peft_config.target_modules
        if isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config.target_modules = _all_linear(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with one warning for all modules in which the mask would mask nothing.

        If it fails, the model is left as it was.

        Raises:
            ValueError: targets lie where PEFT does not look for them, inside of another method's modules; the adapter
                was trained on a base with other zeros; it comes from a file, and the model is partly on disk; or it
                can't have this name.
        """
        with self.injecting(adapter_name):
            config = self._own_config(adapter_name)
            refuse_rewriting(model)
            if config.was_saved:
                refuse_disk_offload(model)
            _refuse_hidden_targets(config, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if config.mask == "weight":
                layers = _layers_of(model, adapter_name)
                _record_base(config, adapter_name, layers)
                _warn_about_dense(layers, adapter_name)

    def _own_config(self, adapter_name: str) -> SparseLoraConfig:
        """The config of an adapter; a copy if another adapter has this very object, which tells of its base."""
        config = self.peft_config[adapter_name]
        if config.in_use:
            config = self.peft_config[adapter_name] = copy.copy(config)
            config.base_fingerprint, config.in_use = None, False
        return config

    def _create_and_replace(
        self,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        rank = peft_config.rank_pattern.get(rank_key, peft_config.r)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        rank_field = f"rank_pattern[{rank_key!r}]" if rank_key in peft_config.rank_pattern else "r"
        if isinstance(target, SparseLoraLayer):
            _check_rank(rank_field, rank, target)
            target.update_layer(adapter_name, peft_config, rank, alpha)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{current_key!r} is the output map of torch's MultiheadAttention, which reads its weight and never "
                f"calls it, so an adapter there would do nothing. Leave it out: exclude_modules=[{current_key!r}]."
            )
        if _is_never_called(parent, target_name):
            raise ValueError(
                f"{current_key!r} is a layer of {type(parent).__name__}, which reads its weight without calling it, "
                "always or with fused kernels, so an adapter there would do nothing. Leave it out: "
                f"exclude_modules=[{current_key!r}]."
            )
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer_class = SparseLoraConv2d if isinstance(base_layer, nn.Conv2d) else SparseLoraLinear
        new_module = layer_class(target, current_key)
        _check_rank(rank_field, rank, new_module)
        new_module.update_layer(adapter_name, peft_config, rank, alpha)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        if isinstance(parent, nn.TransformerEncoderLayer):
            keep_from_fused_operator(new_module)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's version reads the `weight` of the base layer, which packed ones don't have, to find its device."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """SparseLoRA's tensors alone, where PEFT takes those of the layers of any method that bear the same name."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        biases = cls._get_learnable_bias_state_dict(model, state_dict, config)
        return {key: value for key, value in found.items() if f".{cls.prefix}" in f".{key}" or key in biases}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Where PEFT shows a tuner what it is going to load: the place to refuse it."""
        with cls.loading(model, adapter_name, config):
            _refuse_merged(_layers_of(_base_model(model), adapter_name), adapter_name)
            whole = check_adapter_state(model, adapter_name, state_dict, config.source)
            if config.mask == "stored" and not whole:
                _check_sources(_layers_of(_base_model(model), adapter_name), adapter_name, state_dict, config.source)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As `BaseTuner`'s; without it, what was loaded has the dtype of the base, too."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in () if autocast_adapter_dtype else self._layers():
            for factors in (layer.sparse_low_rank_A, layer.sparse_low_rank_B):
                if adapter_name in factors and not factors[adapter_name].is_meta:
                    factors[adapter_name].data = factors[adapter_name].data.to(layer.base_dtype)

    def _layers(self) -> list[SparseLoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, SparseLoraLayer)]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters of SparseLoRA into the base, all layers or none; see `BaseTuner.merge_adapter`.

        Raises:
            ValueError: adapters have different masks; a weight is shared with another module, which would change too;
                or, with `safe_merge`, a result is not finite. No layer is merged then.
        """
        self._check_merge(adapter_names, safe_merge)
        for layer in self._layers():
            with onload_layer(layer):
                layer.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Take the merged adapters of SparseLoRA out again."""
        for layer in self._layers():
            with onload_layer(layer):
                layer.unmerge()

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for name in adapter_names or ():
            self.peft_config[name]  # raises where there is none
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
        for layer in self._layers():
            for parameter in layer.get_base_layer().parameters(recurse=False):
                _refuse_shared_weight(layer, owners[id(parameter)])
            with onload_layer(layer):
                layer.check_merge(safe_merge, adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """The base model without SparseLoRA, with the adapters of other methods that it carries."""
        if merge:
            self._check_merge(adapter_names, safe_merge)
        if not self.carried_wrappers and not any(map(_is_of_another_method, self.model.modules())):
            return super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        for name, module in list(self.model.named_modules()):
            if isinstance(module, SparseLoraLayer):
                with onload_layer(module):
                    if merge:
                        module.merge(adapter_names=adapter_names)
                self.model.set_submodule(name, module.base_layer)
            elif isinstance(module, AuxiliaryTrainingWrapper) and module not in self.carried_wrappers:
                own = module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                self.model.set_submodule(name, own)
        kept = {n: c for n, c in self.model.peft_config.items() if not isinstance(c, SparseLoraConfig)}
        self.model.peft_config = {**kept, **self.carried_configs}
        _warn_about_filled_zeros(self.model)
        return self.model

    def attach_masks(self, masks: Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
        """See [`attach_masks`]."""
        attach_masks(self, masks, adapter_name)


def attach_masks(model: nn.Module, masks: Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Hand the masks of a pruned model to an adapter that was created with `mask="stored"`.

    They are saved with the adapter, one bit a weight, with a fingerprint of the base weight each one is for. Modules
    of the adapter without a mask keep every weight, about which one warning says so.

    Args:
        model: a `PeftModel`, a `SparseLoraModel`, or a transformers model after `add_adapter`.
        masks: name of the module in the base model -> bool mask of the shape of its weight, True where it is kept.
        adapter_name: the adapter.

    Raises:
        TypeError: a mask is not bool.
        ValueError: there is no such adapter; it stores no masks; a mask is for a module that it does not adapt, which
            would stay dense; or a mask has the wrong shape.
    """
    layers = _layers_of(_base_model(model), adapter_name)
    if not layers:
        there = sorted(
            {name for module in model.modules() if isinstance(module, SparseLoraLayer) for name in module.rank}
        )
        raise ValueError(
            f"The model has no SparseLoRA adapter named {adapter_name!r}; its adapters are {there}. Add one, or name "
            "another."
        )
    unknown = sorted(masks.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"Adapter {adapter_name!r} does not adapt {len(unknown)} of the {len(masks)} masked modules, which would "
            f"stay dense: {name_some(unknown)}. Create it with SparseLoraConfig(target_modules=list(masks))."
        )
    for name, layer in layers.items():
        layer.attach_mask(adapter_name, masks.get(name))
    _warn_about_dense(layers, adapter_name)


def _check_rank(field: str, rank: int, layer: SparseLoraLayer) -> None:
    widths = (layer.in_features, layer.out_features)
    check_memory(field, rank, rank * sum(widths), min(widths), layer.module_name)


def _base_model(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, SparseLoraLayer]:
    """The layers that have this adapter, by the name their module has in the base model."""
    return {
        name.replace(".base_layer", ""): module  # inside the layer of another tuner
        for name, module in model.named_modules()
        if isinstance(module, SparseLoraLayer) and adapter_name in module.sparse_low_rank_A
    }


def _refuse_merged(layers: Mapping[str, SparseLoraLayer], adapter_name: str) -> None:
    """Raise where an adapter is merged: what was added to the base could not be taken off once A and B are others."""
    merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise AdapterStateError(
            f"Adapter {adapter_name!r} is merged into the base ({name_some(merged)}), so no other tensors can be "
            "loaded into it: it could not be unmerged any more. Call unmerge_adapter() first."
        )


def _warn_about_dense(layers: Mapping[str, SparseLoraLayer], adapter_name: str) -> None:
    """Say once for all modules of an adapter in which of them its mask masks nothing."""
    dense = [name for name, layer in layers.items() if layer.masks_nothing(adapter_name)]
    if dense:
        warnings.warn(
            f"Nothing is masked in {len(dense)} of the {len(layers)} modules of adapter {adapter_name!r}: none of "
            f"their weights is pruned, so they are fine-tuned as with plain LoRA: {name_some(dense)}.",
            stacklevel=2,
        )


def _record_base(config: SparseLoraConfig, adapter_name: str, layers: Mapping[str, SparseLoraLayer]) -> None:
    """Note in the config where the base is not zero, or compare it with what is noted there."""
    masks = (None if layer.base_weight() is None else layer.get_mask(adapter_name) for layer in layers.values())
    found = base_fingerprint(masks)
    if found is None:
        return
    if config.base_fingerprint is None:
        config.base_fingerprint = found
    elif not same_base(config.base_fingerprint, found):
        raise ValueError(
            f"Adapter {adapter_name!r} was trained on another base: it reads its mask from the zeros of the weights "
            "(mask='weight'), and here they are others than those that base_fingerprint in its config was taken from. "
            "Load it on the pruned model that it was trained on. To train it further on this one, set "
            "base_fingerprint to null in adapter_config.json."
        )
    config.in_use = True


def _check_sources(
    layers: Mapping[str, SparseLoraLayer],
    adapter_name: str,
    state_dict: Mapping[str, torch.Tensor],
    folder: str | None,
) -> None:
    """Check that the stored masks in a state dict were made for the weights of these layers."""
    for name, layer in layers.items():
        # The shortest: the name of one module may be the end of another's.
        key = min((key for key in state_dict if key.endswith(f"{name}.sparse_low_rank_source")), key=len)
        if state_dict[key].any() and layer.base_weight() is not None:
            try:
                with layer._onloaded():
                    layer.check_source(adapter_name, state_dict[key])
            except ValueError as error:
                where = "" if folder is None else f" of the adapter in {folder}"
                raise ValueError(f"{key}{where}: {error}") from error


def _refuse_shared_weight(layer: SparseLoraLayer, owners: list[str]) -> None:
    if len(owners) > 1:
        raise ValueError(
            f"{layer.module_name!r} shares its weight with other modules: {name_some(owners)}. Merging would change "
            "them too, and give another model. Save the base once with tie_word_embeddings=False, and train above "
            f"that; or leave the module out, with exclude_modules=[{layer.module_name!r}]."
        )


def _warn_about_filled_zeros(model: nn.Module) -> None:
    """Say where merging a LoRA that the model goes on carrying would fill zeros."""
    zeros = {
        name: int(module.get_base_layer().get_parameter("weight").eq(0).sum())
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and find_layout(module.get_base_layer()) is not None
    }
    filled = [name for name, count in zeros.items() if count]
    if filled:
        warnings.warn(
            f"The model still carries LoRA adapters on {len(filled)} modules with zeros in their weights: "
            f"{name_some(filled)}. Merging those would fill {sum(zeros.values())} zeros; keep them unmerged where the "
            "sparsity has to stay.",
            stacklevel=2,
        )


def _all_linear(peft_config: SparseLoraConfig, model: nn.Module) -> set[str]:
    """Names of all linear layers of a model, in the layers that the configuration chooses."""
    known_to_peft = include_all_linear_layers(copy.copy(peft_config), model).target_modules
    names = set(known_to_peft or ()) | _registered_linears(model)
    names = {name for name in names if _is_called_as_linear(model.get_submodule(name))}
    # PEFT looks for targets before it says which modules it saves whole, by the ends of their names.
    whole = modules_saved_whole(peft_config)
    names = _in_chosen_layers(peft_config, {name for name in names if not name.endswith(whole)})
    return names - _never_called(peft_config, model, names)


def _is_called_as_linear(module: nn.Module) -> bool:
    """Whether a layer is called, and what it computes is linear; pruning leaves the others out as well."""
    return not isinstance(module, NonDynamicallyQuantizableLinear) and not has_forward_of_its_own(module)


def _is_never_called(parent: nn.Module, name: str) -> bool:
    return any(name in _NEVER_CALLED.get(each.__name__, ()) for each in type(parent).__mro__)


def _never_called(peft_config: SparseLoraConfig, model: nn.Module, names: set[str]) -> set[str]:
    """Those of the modules whose weights the model reads without calling them; warns of what is not excluded."""
    found = set()
    for name in names:
        parent, _, own_name = name.removesuffix(".base_layer").rpartition(".")
        if _is_never_called(model.get_submodule(parent), own_name):
            found.add(name)
    every = copy.copy(peft_config)
    every.target_modules = found
    left_out = sorted(name for name in found if check_target_module_exists(every, name))
    if left_out:
        warnings.warn(
            f"SparseLoRA leaves out {len(left_out)} linear layers whose weights the model reads without calling them, "
            f"always or with fused kernels: {name_some(left_out)}. What pruning took there is not restored.",
            stacklevel=2,
        )
    return found


def _refuse_hidden_targets(peft_config: SparseLoraConfig, model: nn.Module) -> None:
    """Raise if targets lie inside of a module that another method has wrapped: PEFT passes over them silently."""
    wrappers = [name for name, module in model.named_modules() if _is_of_another_method(module)]
    hidden = [
        name
        for name, module in model.named_modules()
        if any(name.startswith(f"{wrapper}.base_layer.") for wrapper in wrappers)
        and find_layout(module) is not None
        and _is_target(peft_config, name)
    ]
    if hidden:
        raise ValueError(
            f"{len(hidden)} target modules lie inside of modules that carry an adapter of another method, where PEFT "
            f"does not look for targets: {name_some(hidden)}. Add SparseLoRA first and the other adapter (a Variator "
            "plugin, say) after it, or name target_modules outside of them."
        )


def _is_of_another_method(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, SparseLoraLayer)


def _is_target(peft_config: SparseLoraConfig, key: str) -> bool:
    if peft_config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return True
    return bool(check_target_module_exists(peft_config, key.replace(".base_layer", "")))


def _registered_linears(model: nn.Module) -> set[str]:
    """Names of the linear layers of classes that PEFT does not know, outside of other adapters."""
    known = (nn.Linear, Conv1D, nn.Conv2d)
    return {
        name
        for name, module in model.named_modules()
        if find_layout(module) is not None and not isinstance(module, known) and not name.endswith(".base_layer")
    }


def _in_chosen_layers(peft_config: SparseLoraConfig, names: set[str]) -> set[str]:
    """The names in the layers of `layers_to_transform`, which PEFT does not look at for full names."""
    if peft_config.layers_to_transform is None:
        return names
    chosen = modules_in_layers(peft_config, names, peft_config.layers_to_transform)
    if not chosen:
        raise ValueError(
            f"layers_to_transform={peft_config.layers_to_transform!r}, layers_pattern={peft_config.layers_pattern!r}: "
            f"none of {name_some(sorted(names))} is in these layers. Indices count from 0 in the list that "
            "layers_pattern names."
        )
    return chosen
