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

from ...offloading import refuse_rewriting
from .config import VariatorConfig
from .layer import VariatorLayer
from .plugin import PluginModule
from .ratios import set_compression_ratio
from .targets import default_targets
from .wrapping import refresh_hooks, remove_hooks, wrap


__all__ = ["VariatorModel"]


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
        refuse_rewriting(model)
        self._pre_injection_hook(model, self.peft_config[adapter_name], adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT leaves adapters that were there before as trainable as they were.
        for module in self.carried_modules:
            module.requires_grad_(False)
        refresh_hooks(model)

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
            target = wrap(self.model, peft_config, target, target_name, parent, current_key)
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
        remove_hooks(self.model)
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
