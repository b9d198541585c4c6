"""Keeping the arguments that the blocks of a chain are called with, to call them again one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .calls import Batch, Call, hooked, run_model
from .chains import Chain
from .modalities import innermost


__all__ = ["Capture", "capture"]


@dataclass
class Capture:
    """What one batch gives the blocks of a chain.

    `calls` holds one call for each block, or several for a chain of one block that runs several times; `real_tokens`
    says which positions of the batch are no padding, bool (batch, length), None where the tower was not told.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    real_tokens: Tensor | None = None


class _StopForwardError(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _without_caches(call: Call) -> Call:
    """The call without key-value caches: a cache would grow with every replay."""
    for slot, value in call.items():
        if isinstance(value, Cache):
            call.fill(slot, None)
    return call


def _tower_mask(args: Any, kwargs: Any, tower: nn.Module) -> Tensor | None:
    """The padding mask (batch, length) that a tower was called with."""
    arguments = inspect.signature(tower.forward).bind_partial(*args, **kwargs).arguments
    mask = arguments.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def capture(model: nn.Module, chain: Chain, batches: Sequence[Batch]) -> list[Capture]:
    """The calls of the chain's blocks on every batch.

    Of the first block all arguments are kept, of the others all but what the block before gives. The forward pass ends
    where the last block would begin.
    """
    modules = dict(model.named_modules())
    towers = [name for name, module in modules.items() if isinstance(module, PreTrainedModel)]
    tower = innermost(chain.blocks[0], towers)
    links = dict(zip(chain.blocks, chain.links, strict=True))
    captures: list[Capture] = []

    def note_mask(name: str, args: Any, kwargs: Any) -> None:
        captures[-1].real_tokens = _tower_mask(args, kwargs, modules[name])

    def note_call(name: str, args: Any, kwargs: Any) -> None:
        call = _without_caches(Call(list(args), dict(kwargs)))
        for slot in links[name]:
            call.fill(slot, None)
        captures[-1].calls.setdefault(name, []).append(call)
        if len(chain.blocks) > 1 and name == chain.blocks[-1]:
            raise _StopForwardError

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if tower is not None:
            stack.enter_context(hooked({tower: modules[tower]}, note_mask))
        stack.enter_context(hooked({name: modules[name] for name in chain.blocks}, note_call))
        for batch in batches:
            captures.append(Capture())
            try:
                run_model(model, batch)
            except _StopForwardError:
                pass
    return captures
