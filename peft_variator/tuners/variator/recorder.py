"""Keeping the arguments of the models around a stack while they run: they know more than the stack is told."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


__all__ = ["CallRecorder", "frames", "inherited", "recorded"]

# What a head knows and its stack does not; the ids too, which a vision-language model turns into embeddings.
OF_HEADS = ("input_ids", "labels", "logits_to_keep", "shift_labels")
OF_STACKS = (
    "attention_mask",
    "inputs_embeds",
    "output_router_logits",
    "past_key_values",
    "pixel_values",
    "position_ids",
    "write_index",  # of continuous batching: where in its paged cache the tokens go
)

# Calls of the surrounding models that are under way, outermost first; a thread each, as replicas run in threads.
_active = threading.local()


def frames() -> list[tuple[nn.Module, dict[str, Any]]]:
    """The surrounding models whose calls are under way, outermost first, each with its arguments."""
    if not hasattr(_active, "frames"):
        _active.frames = []
    return _active.frames


def recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that say something about its tokens, by name."""
    arguments = dict(zip(_parameters_of(type(module).forward), args, strict=False)) | kwargs
    return {name: arguments[name] for name in OF_HEADS + OF_STACKS if arguments.get(name) is not None}


@cache
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward. Looked up once, as decoding a token should cost nothing."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _close(module: nn.Module) -> None:
    """Drop the record of a module's call, and of calls inside it that ended in an error."""
    calls = frames()
    for depth in reversed(range(len(calls))):
        if calls[depth][0] is module:
            del calls[depth:]
            return


class CallRecorder:
    """Keeps the arguments of a surrounding model's call while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the call."""
        _close(module)  # a call that ended in an error inside of compiled code was not forgotten
        frames().append((module, recorded(module, args, kwargs)))

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the call."""
        _close(module)


def inherited(stack: nn.Module) -> dict[str, Any]:
    """What the surrounding models were called with and the stack was not asked for."""
    arguments: dict[str, Any] = {}
    for _, known in frames():
        arguments |= known
    asked = set(_parameters_of(type(stack).forward)) - set(OF_HEADS)
    return {name: value for name, value in arguments.items() if name not in asked}
