"""Calls of a model and its blocks: watching them with hooks, and making one again with the arguments it had.

No architecture is known here: a block is any module, and its arguments are whatever it was called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tuners.variator.forward_context import single_blocks


__all__ = ["Batch", "Call", "Slot", "hooked", "leaves", "run_block", "run_model"]

Batch = Mapping[str, Any] | Tensor
Slot = int | str
"""Where an argument stands in a call: its position or its keyword."""


@dataclass
class Call:
    """The arguments of one call of a block."""

    args: list[Any]
    kwargs: dict[str, Any]

    def items(self) -> list[tuple[Slot, Any]]:
        """All arguments with their slots."""
        return [*enumerate(self.args), *self.kwargs.items()]

    def fill(self, slot: Slot, value: Any) -> None:
        """Put `value` where `slot` says."""
        if isinstance(slot, int):
            self.args[slot] = value
        else:
            self.kwargs[slot] = value


def leaves(output: Any) -> list[Any]:
    """A block's output as a list: the tensor alone, or the values of a tuple or mapping."""
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], pre: Callable[..., Any], post: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Call `pre(name, args, kwargs)` before and `post(name, args, output)` after each module; hooks go in the end."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
                return pre(name, args, kwargs)

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if post is None:
                continue

            def after(_: nn.Module, args: Any, output: Any, name: str = name) -> Any:
                return post(name, args, output)

            stack.callback(module.register_forward_hook(after).remove)
        yield


def run_model(model: nn.Module, batch: Batch) -> Any:
    """`model` on one calibration batch, moved to where its first weights are."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})


def run_block(block: nn.Module, call: Call, links: Mapping[Slot, int], previous: list[Any]) -> list[Any]:
    """Call a block with the linked slots filled from the previous block's output; returns its output's leaves."""
    for slot, index in links.items():
        call.fill(slot, previous[index])
    with torch.no_grad():
        with single_blocks():  # the base model is calibrated, whatever plugins it carries
            output = leaves(block(*call.args, **call.kwargs))
    for slot in links:
        call.fill(slot, None)
    return output
