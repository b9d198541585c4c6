"""The tuner that puts Variator plugins into a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .architectures import FeedForward, owner_of
from .config import VariatorConfig
from .hooks import CallRecorder, CheckpointHook, StackHooks, hooks_of
from .layer import FeedForwardEnd, PluginModule, VariatorLayer
from .targets import default_targets, feed_forward_at, hidden_size_of, named_stack, stack_kind


__all__ = ["VariatorModel", "set_compression_ratio"]


class VariatorModel(BaseTuner):
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
        model.peft_config = {**self.peft_config, **self.carried_configs}  # type: ignore[assignment]  # as PEFT does

    def _pre_injection_hook(self, model: nn.Module, config: VariatorConfig, adapter_name: str) -> None:
        if config.target_modules is None:
            config.target_modules = default_targets(model, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put a plugin into the model; see `BaseTuner.inject_adapter`."""
        self._pre_injection_hook(model, self.peft_config[adapter_name], adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT leaves adapters that were there before as trainable as they were.
        for module in self.carried_modules:
            module.requires_grad_(False)
        for module in model.modules():
            hooks = hooks_of(module, StackHooks)
            if hooks is not None:
                hooks.refresh()

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
        """PEFT's matching, with `layers_to_transform` honoured for a regex too, since that is what the default is."""
        anywhere = copy.copy(peft_config)
        anywhere.layers_to_transform = None
        found = check_target_module_exists(anywhere, key)
        if not found or peft_config.layers_to_transform is None:
            return found
        by_layer = copy.copy(peft_config)
        by_layer.target_modules = {key.rpartition(".")[2]}
        # PEFT looks for a layer's number behind two names, but a stack by itself has just one: `layers.0.mlp`.
        return check_target_module_exists(by_layer, f"model.{key}")

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
            target = self._wrap(peft_config, target, target_name, parent, current_key)
        target.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            target.requires_grad_(False)

    def _wrap(
        self, config: VariatorConfig, target: nn.Module, target_name: str, parent: nn.Module, key: str
    ) -> VariatorLayer:
        """Put a plugin's modules where a feed-forward network starts and ends, and hooks where its mask is known."""
        owner_name, owner = owner_of(self.model, key)
        feed_forward = feed_forward_at(owner, key, config)
        hidden_size = hidden_size_of(owner, target, key)
        if feed_forward.end is not None:
            self._wrap_end(parent, feed_forward.end, key, hidden_size)
        layer = VariatorLayer(target, key, hidden_size, has_end=feed_forward.end is not None)
        self._replace_module(parent, target_name, layer, target)
        stack_name, stack = owner_name, owner
        if config.stack_module is not None:
            stack_name, stack = named_stack(self.model, config.stack_module, key)
        self._install_hooks(stack_name, stack, key, feed_forward)
        return layer

    def _wrap_end(self, parent: nn.Module, end: str, key: str, hidden_size: int) -> None:
        try:
            end_parent, end_module, end_name = _get_submodules(parent, end)
        except AttributeError as error:
            raise ValueError(
                f"end_module={end!r} was not found beside {key!r}. Name the module relative to the parent of the "
                f"module where the feed-forward network starts; that has {sorted(dict(parent.named_children()))}."
            ) from error
        setattr(end_parent, end_name, FeedForwardEnd(end_module, key, hidden_size))

    def _install_hooks(self, stack_name: str, stack: nn.Module, key: str, feed_forward: FeedForward) -> None:
        if hooks_of(stack, StackHooks) is None:
            StackHooks(stack, stack_kind(stack, feed_forward))
        for name, module in self.model.named_modules():
            is_around = not name or stack_name == name or stack_name.startswith(f"{name}.")
            is_model = not name or isinstance(module, PreTrainedModel)
            if module is not stack and is_around and is_model and hooks_of(module, CallRecorder) is None:
                CallRecorder(module)
            is_block = isinstance(module, GradientCheckpointingLayer) and key.startswith(f"{name}.")
            if is_block and hooks_of(module, CheckpointHook) is None:
                CheckpointHook(module)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version reads `child.weight`, which a feed-forward network does not have.
        setattr(parent, child_name, new_module)

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
        layers = [module for module in self.model.modules() if isinstance(module, VariatorLayer)]
        containers = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
        for container in containers if autocast_adapter_dtype else ():
            for parameter in container[adapter_name].parameters() if adapter_name in container else ():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The plugin's tensors alone, where PEFT takes those of the layers of any method that bear the same name."""
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {key: value for key, value in found.items() if f".{cls.prefix}" in f".{key}"}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls this around a forward and then drops the argument: every sample would get the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: Variator plugins cannot be mixed inside one batch. Call "
                "set_adapter and then the model, once for each of them."
            )
        yield

    def _check_merge_allowed(self) -> NoReturn:
        """Refuse to merge, before any layer is touched."""
        next(module for module in self.model.modules() if isinstance(module, PluginModule)).merge()
        raise AssertionError("unreachable: PluginModule.merge always raises")

    def unload(self) -> nn.Module:
        """The base model without plugins and without their hooks, with the adapters that it carried before."""
        for name, module in list(self._own_modules()):
            parent, _, child_name = _get_submodules(self.model, name)
            base = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            setattr(parent, child_name, base)
        for module in self.model.modules():
            for hook_type in (StackHooks, CallRecorder, CheckpointHook):
                hooks = hooks_of(module, hook_type)
                if hooks is not None:
                    for handle in hooks.handles:
                        handle.remove()
        if self.carried_configs:
            self.model.peft_config = self.carried_configs
        else:
            del self.model.peft_config
        return self.model

    def set_compression_ratio(self, k: int, adapter_name: str | None = None) -> None:
        """Change the compression ratio k of a plugin; see [`set_compression_ratio`]."""
        set_compression_ratio(self.model, k, adapter_name)


def _is_of_another_method(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, PluginModule)


def set_compression_ratio(model: nn.Module, k: int, adapter_name: str | None = None) -> None:
    """Change the compression ratio k at run time, for every module of a plugin, those of `ratio_pattern` included.

    The saved configuration keeps the ratio that the plugin was made with.

    Args:
        model: a model with a Variator plugin, from `get_peft_model` or loaded with transformers' `load_adapter`.
        k: the ratio, from 1 (the exact base model) upwards.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        ValueError: `k` is not a positive integer, the model has no such plugin, or the plugin's scores are tied to
            another ratio (`scoring="concat"`).
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"compression_ratio={k!r} has to be an integer of at least 1.")
    layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
    available = sorted({name for layer in layers for name in layer.rules})
    chosen = [(layer, name) for layer in layers for name in layer.rules if _is_chosen(layer, name, adapter_name)]
    if not chosen:
        missing = "active Variator plugin" if adapter_name is None else f"Variator plugin {adapter_name!r}"
        raise ValueError(f"The model has no {missing}. Its plugins are {available}.")
    for layer, name in chosen:
        layer.check_ratio(name, k)
    for layer, name in chosen:
        layer.set_ratio(name, k)


def _is_chosen(layer: VariatorLayer, name: str, adapter_name: str | None) -> bool:
    return name == adapter_name if adapter_name is not None else name in layer.active_adapters
