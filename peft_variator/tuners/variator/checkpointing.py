"""Gradient checkpointing: a plugin that runs again in the backward gets the call back that it belonged to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .call import StackCall
from .plugin import PluginModule, hand_out


__all__ = ["CheckpointHook", "tie"]


class CheckpointHook:
    """Gives a block's plugins their call back when gradient checkpointing computes the block again.

    The stack's hooks do the same for all plugins at once. Where layers are on several devices, their backwards run in
    several threads, and each block has to look after its own.
    """

    def __init__(self, block: nn.Module) -> None:
        self.handles: list[RemovableHandle] = [block.register_forward_hook(self.after)]

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Tie the call to the output."""
        if block.gradient_checkpointing and block.training:
            tie([module for module in block.modules() if isinstance(module, PluginModule)], output)


@torch.compiler.disable
def tie(plugins: list[PluginModule], output: Any) -> None:
    """Have a call restored when the backward reaches what it gave.

    A layer that is checkpointed runs a second time during the backward, after other calls may have taken place. The
    gradient of a later tensor is computed just before, so a hook on that restores the call that the tensor came from.

    Args:
        plugins: plugins inside the module that was called.
        output: what the module gave.
    """
    call = plugins[0].call if plugins and torch.is_grad_enabled() else None
    if call is not None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(_restore, plugins, call))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _restore(plugins: list[PluginModule], call: StackCall, gradient: Tensor) -> None:
    if plugins[0].call is None:
        # Behind the backward, a plugin is outside of any call again.
        torch.autograd.Variable._execution_engine.queue_callback(partial(hand_out, None, plugins))
    hand_out(call, plugins)
