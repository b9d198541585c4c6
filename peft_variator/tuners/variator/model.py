"""The tuner that puts Variator plugins into a model."""

from __future__ import annotations

import copy
import re
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import _get_submodules
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .architectures import FEED_FORWARDS, FeedForward, candidates, find_feed_forwards, matches, owner_of
from .call import StackKind
from .config import VariatorConfig
from .hooks import CallRecorder, CheckpointHook, StackHooks, hooks_of
from .layer import FeedForwardEnd, PluginModule, VariatorLayer


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

    def _pre_injection_hook(self, model: nn.Module, config: VariatorConfig, adapter_name: str) -> None:
        if config.target_modules is None:
            config.target_modules = _default_targets(model, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put a plugin into the model; see `BaseTuner.inject_adapter`."""
        self._pre_injection_hook(model, self.peft_config[adapter_name], adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
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
        feed_forward = _feed_forward(owner, key, config)
        hidden_size = _hidden_size(owner, target, key)
        if feed_forward.end is not None:
            self._wrap_end(parent, feed_forward.end, key, hidden_size)
        layer = VariatorLayer(target, key, hidden_size, has_end=feed_forward.end is not None)
        self._replace_module(parent, target_name, layer, target)
        stack_name, stack = owner_name, owner
        if config.stack_module is not None:
            stack_name, stack = _named_stack(self.model, config.stack_module, key)
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
            StackHooks(stack, _stack_kind(stack, feed_forward))
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
        """The base model without plugins and without their hooks."""
        model = super().unload()
        for module in model.modules():
            for hook_type in (StackHooks, CallRecorder, CheckpointHook):
                hooks = hooks_of(module, hook_type)
                if hooks is not None:
                    for handle in hooks.handles:
                        handle.remove()
        return model

    def set_compression_ratio(self, k: int, adapter_name: str | None = None) -> None:
        """Change the compression ratio k of a plugin; see [`set_compression_ratio`]."""
        set_compression_ratio(self.model, k, adapter_name)


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
        layer.set_ratio(name, k)


def _is_chosen(layer: VariatorLayer, name: str, adapter_name: str | None) -> bool:
    return name == adapter_name if adapter_name is not None else name in layer.active_adapters


def _default_targets(model: nn.Module, config: VariatorConfig) -> str:
    """A regex for the feed-forward networks of a known architecture."""
    stacks: dict[str, FeedForward] = {}
    names = []
    for name, feed_forward in find_feed_forwards(model):
        owner_name, owner = owner_of(model, name)
        if config.compress_vision_tower or _stack_kind(owner, feed_forward) != "vision":
            stacks[owner_name] = feed_forward
            names.append(name)
    if not names:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"No feed-forward network to compress was found in {type(model).__name__} (model type {model_type!r}). "
            "Please specify `target_modules` (where one starts), `end_module` (where it ends) and `stack_module` (the "
            f"module that takes the attention mask). Modules that may be one: {candidates(model)}. Known model types: "
            f"{sorted(FEED_FORWARDS)}."
        )
    return _regex_for(model, names, stacks)


def _regex_for(model: nn.Module, names: list[str], stacks: dict[str, FeedForward]) -> str:
    """The most general regex that matches `names` and no other module, so that the plugin fits other heads too.

    Args:
        model: the base model.
        names: full names of the feed-forward networks.
        stacks: the row of the table for each of the models around them, by full name.
    """
    anywhere = "|".join(sorted({rf"(?:.*\.)?{row.start}" for row in stacks.values()}))
    ends = {re.escape(name.rpartition(".")[2]): row for name, row in stacks.items() if name}
    in_stacks = "|".join(rf"(?:.*\.)?{end}\.(?:.*\.)?{row.start}" for end, row in sorted(ends.items()))
    for regex in (anywhere, in_stacks):
        if {name for name, _ in model.named_modules() if re.fullmatch(regex, name)} == set(names):
            return regex
    return "|".join(map(re.escape, names))


def _feed_forward(owner: nn.Module, key: str, config: VariatorConfig) -> FeedForward:
    """The table's row for a module, or what the configuration says of an architecture that is not in it."""
    row = FEED_FORWARDS.get(owner.config.model_type) if isinstance(owner, PreTrainedModel) else None
    if config.end_module is None and row is not None and matches(row, key):
        return row
    return FeedForward(re.escape(key), config.end_module)


def _named_stack(model: nn.Module, stack_module: str, key: str) -> tuple[str, nn.Module]:
    """The innermost module around `key` whose name is, or ends in, `stack_module`."""
    name = key
    while name:
        name = name.rpartition(".")[0]
        if name == stack_module or name.endswith(f".{stack_module}"):
            return name, model.get_submodule(name)
    if stack_module == "":
        return "", model
    raise ValueError(
        f"stack_module={stack_module!r} is no module around {key!r}. Name one of the modules on its path, or '' for "
        "the model itself."
    )


def _stack_kind(stack: nn.Module, feed_forward: FeedForward) -> StackKind:
    if isinstance(stack, PreTrainedModel) and stack.main_input_name == "pixel_values":
        return "vision"
    if feed_forward.causal is not None:
        return "causal" if feed_forward.causal else "encoder"
    is_causal = any(getattr(module, "is_causal", False) for module in stack.modules())
    return "causal" if is_causal else "encoder"


def _hidden_size(owner: nn.Module, target: nn.Module, key: str) -> int:
    """Width of the hidden states that a feed-forward network takes and gives."""
    if isinstance(owner, PreTrainedModel):
        return int(owner.config.hidden_size)
    for module in target.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(
        f"The width of {key!r} is not known: it has no nn.Linear and its model has no config.hidden_size."
    )
