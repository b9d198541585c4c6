"""The tuner that puts Variator plugins into a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapter_state import AdapterStateError, TidyTuner, check_adapter_state, modules_in_layers
from ...compat import keep_from_fused_operator, keep_quantized_modules
from ...field_types import shown
from ...models import KEY_PREFIX
from ...offloading import refuse_disk_offload, refuse_rewriting
from ...saved_config import NamedConfigs
from .architectures import check_not_refused
from .base_reading import read_when_loaded
from .compensation import compensate
from .config import VariatorConfig, matches_pattern
from .forward_context import PluginRatios
from .hooks import StackForward, SurroundingForward, forward_of, unwrap_forwards
from .layer import FeedForwardEnd, PluginModule, SpanLayer, VariatorLayer, plugin_layers
from .linear_maps import RoundedFactor, RoundedRows
from .outliers import OutlierProbe
from .placement import Placement, default_targets, layer_of_torch, place
from .quantization import float_state, quantized_parts
from .ratios import compression_ratio_of, layers_of, set_compression_ratio, set_min_tokens, using_ratio
from .spans import place_span, span_targets


__all__ = ["VariatorModel"]


class VariatorModel(TidyTuner):
    """Puts compression plugins around the feed-forward networks of a frozen model.

    Based on Xiao et al. 2023 (https://arxiv.org/abs/2310.15724). Created by `get_peft_model(model, VariatorConfig())`.

    Args:
        model: the base model.
        peft_config: the plugin's configuration.
        adapter_name: the plugin's name.

    Raises:
        ValueError: no feed-forward network was found, or the model cannot take a plugin; the message says why.
    """

    prefix: str = "variator_"
    tuner_layer_cls = PluginModule
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: VariatorConfig | dict[str, VariatorConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        # What the model carries already, such as a task's LoRA, belongs to the base model: it stays as it is whatever
        # happens to the plugins, even where it bears a plugin's name.
        self.carried_modules = [module for module in model.modules() if _is_of_another_method(module)]
        configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
        self.carried_configs = {n: config for n, config in configs.items() if not isinstance(config, VariatorConfig)}
        if not self.carried_configs:
            super().__init__(model, peft_config, adapter_name, **kwargs)
            return
        # PEFT keeps one dictionary of configurations for a model, and overwrites those that have a plugin's name.
        self.peft_config = {n: config for n, config in configs.items() if isinstance(config, VariatorConfig)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            super().__init__(model, peft_config, adapter_name, **kwargs)
        model.peft_config = NamedConfigs({**self.peft_config, **self.carried_configs})  # type: ignore[assignment]

    def _pre_injection_hook(self, model: nn.Module, config: VariatorConfig, adapter_name: str) -> None:
        if config.target_modules is None:
            find = default_targets if config.layer_spans is None else span_targets
            config.target_modules = find(model, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put a plugin into the model, or raise and leave the model as it was; see `BaseTuner.inject_adapter`.

        Raises:
            ValueError: no feed-forward network was found, the model cannot take a plugin, it is partly on disk and the
                plugin comes from a file, or the plugin can't have this name.
        """
        with self.injecting(adapter_name):
            config = self.peft_config[adapter_name]
            refuse_rewriting(model)
            if config.was_saved:
                refuse_disk_offload(model)
            self._pre_injection_hook(model, config, adapter_name)
            self._placements = self._place_all(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            compensate(model, list(self._placements.values()), config, adapter_name)
            for layer in plugin_layers(model):
                layer.find_plain_network(adapter_name)
            # PEFT leaves adapters that were there before as trainable as they were.
            for module in self.carried_modules:
                module.requires_grad_(False)
            for key, placement in self._placements.items():
                _wrap_forwards(model, placement)
                plugin = model.get_submodule(key)
                is_new = isinstance(plugin, VariatorLayer) and list(plugin.rules) == [adapter_name]
                if is_new and isinstance(layer_of_torch(model, key), nn.TransformerEncoderLayer):
                    keep_from_fused_operator(plugin)
            _refresh_stacks(model)
            self._warn_about_patterns(config, list(self._placements))
            self._warn_about_decompression(config, adapter_name)
            if config.correction_bits is not None and not config.inference_mode:
                compensation = "" if config.compensation_bits is None else ", and its compensation,"
                warnings.warn(
                    f"correction_bits={config.correction_bits}: the neurons that {adapter_name!r} copies"
                    f"{compensation} are rounded and will not be trained, only what is beside them. To train it on, "
                    "load the plugin that it was made from.",
                    UserWarning,
                    stacklevel=2,
                )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: VariatorConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Where PEFT shows a tuner what it is going to load: the place to refuse it."""
        with cls.loading(model, adapter_name, config):
            parts = quantized_parts(model, adapter_name)
            if parts:
                raise AdapterStateError(
                    f"The plugin {adapter_name!r} is quantised in this model ({parts[0]} and others), so no weights "
                    "can be loaded into it. Delete it (`model.delete_adapter`) and load it again, then quantise it."
                )
            check_adapter_state(model, adapter_name, state_dict, config.source)
            _check_neurons(model, state_dict, config.source)
            keep_quantized_modules(model)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _place_all(self, model: nn.Module, config: VariatorConfig) -> dict[str, Placement]:
        """Where the plugins of all networks go, found out before anything is changed."""
        _check_same_spans(model, config)
        wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        placements = {}
        for key, module in model.named_modules():
            if key and not key.startswith(tuple(wrapped)) and self._check_target_module_exists(config, key):
                target = module.base_layer if isinstance(module, VariatorLayer) else module
                placements[key] = _place(model, config, key, target)
        inner = next((key for key in placements for other in placements if key.startswith(f"{other}.")), None)
        if inner is not None:
            raise ValueError(
                f"target_modules={config.target_modules!r} names {inner!r} and a module around it. A plugin goes "
                "around a whole feed-forward network, and there is none inside of it. Name one of them."
            )
        _refuse_parts_to_save(model, config, list(placements.values()))
        if not placements:
            check_not_refused(model)
            _check_schedule_merges(model, config)
        elif config.keep_outliers is not None and all(p.kind in ("vision", "audio") for p in placements.values()):
            raise ValueError(
                f"keep_outliers={config.keep_outliers} is a share of a text's tokens, and this plugin would merge "
                "image patches or frames of sound alone. Leave it out."
            )
        return placements

    def _warn_about_decompression(self, config: VariatorConfig, adapter_name: str) -> None:
        layers = [layer for layer in plugin_layers(self.model) if adapter_name in layer.rules]
        others = [layer.name for layer in layers if layer.decompressions[adapter_name] != config.decompression]
        if others:
            unused = [
                name
                for name in ("correction_dim", "correction_pattern", "correction_rank", "correction_bits")
                if getattr(config, name)
            ]
            ignored = f" {', '.join(unused)} mean nothing there." if unused else ""
            warnings.warn(
                f"decompression={config.decompression!r} copies neurons of a network whose maps are known and can be "
                f"read. Those of {len(others)} modules, {others[0]!r} first, are not: they take the bottleneck, "
                f"{config.bottleneck_width} wide.{ignored}",
                UserWarning,
                stacklevel=2,
            )

    @staticmethod
    def _warn_about_patterns(config: VariatorConfig, names: list[str]) -> None:
        keys = {"ratio_pattern": list(config.ratio_pattern), "correction_pattern": list(config.correction_pattern)}
        for k, row in (config.ratio_schedule or {}).items():
            keys[f"ratio_schedule[{k}]"] = [key for key, ratio in row.items() if ratio > 1]
        for field, patterns in keys.items():
            unused = [key for key in patterns if not any(matches_pattern(key, name) for name in names)]
            if unused:
                warnings.warn(
                    f"{field} has keys that match no module with a plugin: {unused}. Modules with a plugin are "
                    f"{names[:3]}{' and others' if len(names) > 3 else ''}.",
                    UserWarning,
                    stacklevel=2,
                )

    def _check_new_adapter_config(self, config: VariatorConfig) -> None:
        super()._check_new_adapter_config(config)
        chunk_size = getattr(getattr(self.model, "config", None), "chunk_size_feed_forward", 0)
        if chunk_size:
            raise ValueError(
                f"The base model has chunk_size_feed_forward={chunk_size}, so its feed-forward networks never see a "
                "whole sequence and nothing could be merged. Set model.config.chunk_size_feed_forward = 0 before the "
                "model is built."
            )

    @staticmethod
    def _check_target_module_exists(peft_config: VariatorConfig, key: str) -> Any:
        """PEFT's matching, with `layers_to_transform` honoured for a regex too, since that is what the default is.

        What a schedule leaves alone in all of its rows is no target.
        """
        if peft_config.leaves_alone(key):
            return False
        anywhere = copy.copy(peft_config)
        anywhere.layers_to_transform = None
        found = check_target_module_exists(anywhere, key)
        if not found or peft_config.layers_to_transform is None:
            return found
        return bool(modules_in_layers(peft_config, [key], peft_config.layers_to_transform))

    def _create_and_replace(
        self,
        peft_config: VariatorConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not isinstance(target, VariatorLayer):
            if current_key not in self._placements:  # PEFT takes the names of a state dict where it is given one
                self._placements[current_key] = _place(self.model, peft_config, current_key, target)
            target = _wrap_network(self.model, self._placements[current_key], target, target_name, parent)
        target.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            target.requires_grad_(False)

    def _own_modules(self) -> Iterator[tuple[str, PluginModule | AuxiliaryTrainingWrapper]]:
        """Names and modules of the plugins, and of what is trained beside them (`modules_to_save`)."""
        carried = {id(module) for module in self.carried_modules}
        for name, module in self.model.named_modules():
            if isinstance(module, PluginModule | AuxiliaryTrainingWrapper) and id(module) not in carried:
                yield name, module

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the plugin that is used; see `BaseTuner.set_adapter`."""
        wrappers = [module for module in self.carried_modules if isinstance(module, AuxiliaryTrainingWrapper)]
        carried = [(wrapper, wrapper.active_adapters) for wrapper in wrappers]
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for wrapper, active_adapters in carried:
            wrapper.set_adapter(active_adapters, inference_mode=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a plugin; see `BaseTuner.delete_adapter`.

        Raises:
            ValueError: there is no plugin of that name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist. The plugins are {sorted(self.peft_config)}.")
        del self.peft_config[adapter_name]
        own = [module for _, module in self._own_modules()]
        remaining: list[str] = []
        for module in own:
            if isinstance(module, PluginModule):
                module.delete_adapter(adapter_name)
                remaining = remaining or list(module.active_adapters)
        for module in own:
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(adapter_name, new_active_adapters=remaining)
        self.active_adapter = remaining

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for _, module in self._own_modules():
            module.enable_adapters(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep a plugin in single precision on a base model in half precision; see `BaseTuner`."""
        halves = (torch.float16, torch.bfloat16)
        for layer in (module for module in self.model.modules() if isinstance(module, PluginModule)):
            containers = [getattr(layer, name) for name in layer.adapter_layer_names]
            for module in (each[adapter_name] for each in containers if adapter_name in each):
                # What nothing trains is no parameter: a probe's weight, and what is rounded.
                untrained = module.buffers() if isinstance(module, OutlierProbe | RoundedRows | RoundedFactor) else ()
                for tensor in (each for each in chain(module.parameters(), untrained) if not each.is_meta):
                    if autocast_adapter_dtype and tensor.dtype in halves:
                        tensor.data = tensor.data.float()
                    elif not autocast_adapter_dtype and tensor.dtype == torch.float32 and layer.base_dtype in halves:
                        tensor.data = tensor.data.to(layer.base_dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: VariatorConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The plugin's tensors alone, where PEFT takes those of the layers of any method that bear the same name."""
        found = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=float_state(model, adapter_name, state_dict),
            unwanted_adapter_names=unwanted_adapter_names,
        )
        return {key: value for key, value in found.items() if f".{cls.prefix}" in f".{key}"}

    def _check_merge_allowed(self) -> NoReturn:
        """Refuse to merge, before any layer is touched."""
        next(module for module in self.model.modules() if isinstance(module, PluginModule)).merge()
        raise AssertionError("unreachable: PluginModule.merge always raises")

    def unload(self) -> nn.Module:
        """The base model without plugins and without their hooks, with the adapters that it carried before."""
        for name, module in reversed(list(self._own_modules())):  # what is inside of others first
            base = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            self.model.set_submodule(name, base)
        unwrap_forwards(self.model)
        if self.carried_configs:
            self.model.peft_config = self.carried_configs
        else:
            del self.model.peft_config
        return self.model

    @property
    def compression_ratio(self) -> int:
        """The compression ratio k of the active plugin, as it was made or last set for all callers."""
        return compression_ratio_of(self.model)

    def set_compression_ratio(self, k: int, adapter_name: str | None = None) -> None:
        """Change the compression ratio k of a plugin; see [`set_compression_ratio`]."""
        set_compression_ratio(self.model, k, adapter_name)

    @property
    def min_tokens(self) -> int:
        """The fewest tokens of a call that the active plugin merges; see [`set_min_tokens`]."""
        layer, name = layers_of(self.model, None)[0]
        return layer.ratios.min_tokens.get(name, 0)

    def set_min_tokens(self, min_tokens: int, adapter_name: str | None = None) -> None:
        """Have calls of fewer tokens run the base model; see [`set_min_tokens`]."""
        set_min_tokens(self.model, min_tokens, adapter_name)

    def using_ratio(self, k: int, adapter_name: str | None = None) -> AbstractContextManager[None]:
        """Use a plugin at a compression ratio in this thread or task alone; see [`using_ratio`]."""
        return using_ratio(self.model, k, adapter_name)


def _is_of_another_method(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, PluginModule)


def _place(model: nn.Module, config: VariatorConfig, key: str, target: nn.Module) -> Placement:
    return place(model, config, key, target) if config.layer_spans is None else place_span(model, config, key)


def _check_same_spans(model: nn.Module, config: VariatorConfig) -> None:
    """Raise if a model has plugins around other parts of its layers: one would be inside of another."""
    for layer in plugin_layers(model):
        for name, other in layer.configs.items():
            if other.layer_spans != config.layer_spans:
                raise ValueError(
                    f"layer_spans={config.layer_spans}: the plugin {name!r} of this model has {other.layer_spans}, "
                    "and plugins beside one another merge around the same modules. Load this one onto a base of its "
                    "own, or delete the other first."
                )


def _check_schedule_merges(model: nn.Module, config: VariatorConfig) -> None:
    """Raise if there is nowhere to go only because the schedule leaves all networks alone."""
    if config.ratio_schedule is None:
        return
    without = copy.copy(config)
    without.ratio_schedule = None
    is_named = partial(VariatorModel._check_target_module_exists, without)
    named = [key for key, _ in model.named_modules() if key and is_named(key)]
    if named:
        raise ValueError(
            f"ratio_schedule={config.ratio_schedule} merges nothing: the ratio of {named[0]!r}, and of all other "
            f"targets ({len(named)}), is 1 in every row. Give one of them a larger ratio."
        )


def _refuse_parts_to_save(model: nn.Module, config: VariatorConfig, placements: list[Placement]) -> None:
    """Raise if a part of a network that gets a plugin is to be saved whole: it has other names then."""
    networks = [name for placement in placements for name in placement.ends]
    for wrapped, _ in model.named_modules():
        name = wrapped.replace(".base_layer", "")
        inside = any(name == network or name.startswith(f"{network}.") for network in networks)
        if inside and name.endswith(tuple(config.modules_to_save or ())):
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r} names {name!r}, which is part of a network that gets a "
                "plugin. Leave it out, or keep the plugin from it with exclude_modules."
            )


def _check_neurons(model: nn.Module, state_dict: dict[str, Tensor], source: str | None) -> None:
    """Check that the numbers of copied neurons are such of the networks, each once and in order.

    Raises:
        AdapterStateError: naming the first that are not.
    """
    widths = {layer.name: layer.network() for layer in plugin_layers(model)}
    for key, index in state_dict.items():
        name, is_index, _ = key.removeprefix(KEY_PREFIX).partition(".variator_neurons.")
        network = widths.get(name)
        if not is_index or network is None or index.is_meta:
            continue
        numbers = index.flatten().tolist()
        if numbers != sorted(set(numbers)) or not 0 <= min(numbers) <= max(numbers) < network.width:
            where = f"The adapter in {source}" if source else "The state of the plugin"
            raise AdapterStateError(
                f"{where} has {key} = {shown(numbers)}, which are not the numbers of neurons of a network that has "
                f"{network.width} of them (from 0, each at most once, ascending). The file is damaged; save it again."
            )


def _wrap_network(
    model: nn.Module, placement: Placement, target: nn.Module, target_name: str, parent: nn.Module
) -> VariatorLayer:
    """Put a plugin's modules where a feed-forward network starts, as `parent.target_name`, and ends."""
    end, end_module = placement.feed_forward.end, None
    if end is not None:
        end_module = FeedForwardEnd(parent.get_submodule(end), placement.key, placement.hidden_size)
        parent.set_submodule(end, end_module)
    for name in placement.layers[1:-1]:
        model.set_submodule(name, SpanLayer(model.get_submodule(name), placement.key, placement.hidden_size))
    ratios = next((layer.ratios for layer in plugin_layers(model)), None) or PluginRatios()
    layer = VariatorLayer(
        target,
        placement.key,
        placement.hidden_size,
        has_end=end is not None,
        ratios=ratios,
        reads_text=placement.kind in ("encoder", "causal"),
        is_span=bool(placement.layers),
    )
    layer.around = (parent, end_module)
    if end_module is not None:
        read_when_loaded(layer, end_module)
    setattr(parent, target_name, layer)
    return layer


def _wrap_forwards(model: nn.Module, placement: Placement) -> None:
    """Wrap the forwards of a stack and of the models around it, where that is not done yet."""
    ratios = model.get_submodule(placement.key).ratios
    if forward_of(placement.stack) is None:
        row = placement.feed_forward
        StackForward(
            placement.stack,
            ratios,  # type: ignore[arg-type]
            placement.kind,
            row.entries_a_frame or 0,
            reads_last_place=row.reads_last_place,
        )
    for module in _models_around(model, placement.stack_name):
        if forward_of(module) is None:
            SurroundingForward(module, ratios)  # type: ignore[arg-type]


def _models_around(model: nn.Module, stack_name: str) -> Iterator[nn.Module]:
    """The models that a stack is part of, outermost first."""
    for name, module in model.named_modules():
        is_around = stack_name != "" and (not name or stack_name.startswith(f"{name}."))
        if is_around and (not name or isinstance(module, PreTrainedModel)):
            yield module


def _refresh_stacks(model: nn.Module) -> None:
    """Have the stacks look for their plugins anew, after modules were replaced."""
    for name, module in model.named_modules():
        forward = forward_of(module)
        if isinstance(forward, StackForward):
            around = [forward_of(each) for each in _models_around(model, name)]
            forward.refresh([each for each in around if isinstance(each, SurroundingForward)])
