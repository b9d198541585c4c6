"""Where a plugin's modules and hooks go in a base model, and taking the hooks out again."""

from __future__ import annotations

from peft.utils import _get_submodules
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .architectures import FeedForward, owner_of
from .checkpointing import CheckpointHook
from .config import VariatorConfig
from .hooks import StackHooks, hooks_of
from .layer import FeedForwardEnd, VariatorLayer
from .recorder import CallRecorder
from .targets import feed_forward_at, hidden_size_of, named_stack, stack_kind


__all__ = ["refresh_hooks", "remove_hooks", "wrap"]


def wrap(
    model: nn.Module, config: VariatorConfig, target: nn.Module, target_name: str, parent: nn.Module, key: str
) -> VariatorLayer:
    """Put a plugin's modules where a feed-forward network starts and ends, and hooks where its mask is known.

    Args:
        model: the base model.
        config: the plugin's configuration.
        target: module where the network starts.
        target_name: its name in `parent`.
        parent: module that holds it.
        key: its full name in the base model.

    Raises:
        ValueError: the model has no such end of the network or no such stack, or does not tell its hidden size.
    """
    owner_name, owner = owner_of(model, key)
    feed_forward = feed_forward_at(owner, key, config)
    hidden_size = hidden_size_of(owner, target, key)
    if feed_forward.end is not None:
        _wrap_end(parent, feed_forward.end, key, hidden_size)
    layer = VariatorLayer(target, key, hidden_size, has_end=feed_forward.end is not None)
    setattr(parent, target_name, layer)
    stack_name, stack = owner_name, owner
    if config.stack_module is not None:
        stack_name, stack = named_stack(model, config.stack_module, key)
    _install_hooks(model, stack_name, stack, key, feed_forward)
    return layer


def _wrap_end(parent: nn.Module, end: str, key: str, hidden_size: int) -> None:
    try:
        end_parent, end_module, end_name = _get_submodules(parent, end)
    except AttributeError as error:
        raise ValueError(
            f"end_module={end!r} was not found beside {key!r}. Name the module relative to the parent of the "
            f"module where the feed-forward network starts; that has {sorted(dict(parent.named_children()))}."
        ) from error
    setattr(end_parent, end_name, FeedForwardEnd(end_module, key, hidden_size))


def _install_hooks(model: nn.Module, stack_name: str, stack: nn.Module, key: str, feed_forward: FeedForward) -> None:
    if hooks_of(stack, StackHooks) is None:
        StackHooks(stack, stack_kind(stack, feed_forward, model))
    for name, module in model.named_modules():
        is_around = not name or stack_name == name or stack_name.startswith(f"{name}.")
        is_model = not name or isinstance(module, PreTrainedModel)
        if module is not stack and is_around and is_model and hooks_of(module, CallRecorder) is None:
            CallRecorder(module)
        is_block = isinstance(module, GradientCheckpointingLayer) and key.startswith(f"{name}.")
        if is_block and hooks_of(module, CheckpointHook) is None:
            CheckpointHook(module)


def refresh_hooks(model: nn.Module) -> None:
    """Have the stacks look for their plugins anew, after modules were replaced."""
    for module in model.modules():
        hooks = hooks_of(module, StackHooks)
        if hooks is not None:
            hooks.refresh()


def remove_hooks(model: nn.Module) -> None:
    """Take all of our hooks out of a model."""
    for module in model.modules():
        for hook_type in (StackHooks, CallRecorder, CheckpointHook):
            hooks = hooks_of(module, hook_type)
            if hooks is not None:
                for handle in hooks.handles:
                    handle.remove()
