"""Running a model block by block without knowing its architecture.

A forward pass is watched with hooks: which blocks run, in which order, and which of a block's outputs is, as the same
tensor, an input of the next block. Blocks linked in this way form a chain. The arguments of a chain's blocks are
captured once; then its blocks can be called one after the other, each on what the one before it now gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .modalities import innermost


__all__ = ["Batch", "Call", "Capture", "Chain", "capture", "find_chains", "hooked", "run_block", "run_model"]

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


@dataclass
class Chain:
    """Blocks that run one after the other, each on the outputs of the one before.

    `links[i]` says, for block i, which slot takes which leaf of block i-1's output; empty for the first block.
    """

    blocks: list[str]
    links: list[dict[Slot, int]]


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


def _without_caches(call: Call) -> Call:
    """The call without key-value caches: a cache would grow with every replay."""
    for slot, value in call.items():
        if isinstance(value, Cache):
            call.fill(slot, None)
    return call


def _links(call: Call, previous: list[Any]) -> dict[Slot, int]:
    """Which arguments are outputs of the block before; empty unless its first tensor is the call's first tensor."""
    found = {
        slot: index
        for slot, value in call.items()
        for index, leaf in enumerate(previous)
        if isinstance(value, Tensor) and value is leaf
    }
    tensors = [slot for slot, value in call.items() if isinstance(value, Tensor)]
    return found if tensors and found.get(tensors[0]) == 0 else {}


def find_chains(model: nn.Module, blocks: Mapping[str, nn.Module], batch: Batch) -> list[Chain]:
    """Run `batch` through `model` and find the chains its blocks form, in the order they run.

    A block whose input is not the very output of the block before (something was added in between) begins a new chain;
    a block that runs several times is a chain by itself. Blocks that do not run are in none.
    """
    order: list[tuple[str, dict[Slot, int]]] = []
    previous: list[Any] = []

    def before(name: str, args: Any, kwargs: Any) -> None:
        order.append((name, _links(Call(list(args), dict(kwargs)), previous)))

    def after(name: str, args: Any, output: Any) -> None:
        previous[:] = leaves(output)

    with torch.no_grad(), hooked(blocks, before, after):
        run_model(model, batch)
    names = [name for name, _ in order]
    chains: list[Chain] = []
    for name, links in order:
        repeated = names.count(name) > 1
        if links and not repeated and names.count(chains[-1].blocks[-1]) == 1:
            chains[-1].blocks.append(name)
            chains[-1].links.append(links)
        elif all(name not in chain.blocks for chain in chains):
            chains.append(Chain([name], [{}]))
    return chains


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


def run_block(block: nn.Module, call: Call, links: Mapping[Slot, int], previous: list[Any]) -> list[Any]:
    """Call a block with the linked slots filled from the previous block's output; returns its output's leaves."""
    for slot, index in links.items():
        call.fill(slot, previous[index])
    with torch.no_grad():
        output = leaves(block(*call.args, **call.kwargs))
    for slot in links:
        call.fill(slot, None)
    return output
