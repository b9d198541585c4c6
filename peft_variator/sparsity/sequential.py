"""The walk over a model's blocks: statistics of one block, its masks, then on with what the block now gives.

1. `find_chains`: hooks show which blocks run, in which order, and which of a block's outputs is, as the same tensor,
   an input of the next block. Blocks linked in this way form a chain.
2. `capture`: the arguments that the blocks of a chain are called with are kept.
3. `walk_blocks`: the blocks are called again, one after the other, and pruned on the way.

No architecture is known here: a block is any module, and its arguments are whatever it was called with.
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

from ..models import on_device
from ..tuners.variator.forward_context import single_blocks
from .modules import PrunableModule, block_stacks, innermost
from .statistics import Statistics


__all__ = [
    "Batch",
    "Call",
    "Capture",
    "Chain",
    "Slot",
    "TargetsByBlock",
    "capture",
    "find_chains",
    "hooked",
    "run_model",
    "walk_blocks",
]

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
    return model(**on_device(batch, device))


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


@dataclass
class Chain:
    """Blocks that run one after the other, each on the outputs of the one before.

    `links[i]` says, for block i, which slot takes which leaf of block i-1's output; empty for the first block.
    """

    blocks: list[str]
    links: list[dict[Slot, int]]


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


PruneBlock = Callable[[Sequence[PrunableModule], dict[str, Statistics]], None]
TargetsByBlock = Mapping[str, Sequence[PrunableModule]]


def _rows(inputs: Tensor, real_tokens: Tensor | None) -> Tensor:
    """The inputs of real tokens as (tokens, width): padding is left out where the tower was told about it."""
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    positions = tuple(inputs.shape[:-1])
    if real_tokens is None or positions not in (tuple(real_tokens.shape), (real_tokens.numel(),)):
        return rows
    return rows[real_tokens.reshape(-1).to(rows.device)]


class _Collector:
    """Sums up the inputs of some modules, module name -> statistics, while `real_tokens` says what counts."""

    def __init__(self, targets: Sequence[PrunableModule], kind: type[Statistics]) -> None:
        self._targets = {target.name: target for target in targets}
        self._kind = kind
        self.statistics: dict[str, Statistics] = {}
        self.real_tokens: Tensor | None = None

    def _count(self, name: str, args: Any, kwargs: Any) -> None:
        inputs = next(iter([*args, *kwargs.values()]))
        if name not in self.statistics:
            self.statistics[name] = self._kind(self._targets[name].width, inputs.device)
        self.statistics[name].add(_rows(inputs, self.real_tokens))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Count every forward pass inside."""
        with hooked({name: target.module for name, target in self._targets.items()}, self._count):
            yield
        for name, target in self._targets.items():
            if name not in self.statistics:
                self.statistics[name] = self._kind(target.width, torch.device("cpu"))
            self.statistics[name].check(name)


def _trim(chain: Chain, targets: TargetsByBlock) -> Chain | None:
    """The part of a chain from its first to its last block with targets."""
    wanted = [index for index, name in enumerate(chain.blocks) if name in targets]
    if not wanted:
        return None
    part = slice(wanted[0], wanted[-1] + 1)
    return Chain(chain.blocks[part], [{}, *chain.links[part][1:]])


def _chains(model: nn.Module, targets: TargetsByBlock, batches: Sequence[Batch]) -> list[Chain]:
    """The chains to walk, in the order in which the model runs them."""
    stacks = [stack for stack in block_stacks(model).values() if any(block in targets for block in stack)]
    names = list(dict.fromkeys([block for stack in stacks for block in stack] + list(targets)))
    blocks = {name: model.get_submodule(name) for name in names}
    missing: list[str] = []
    for batch in batches:
        chains = find_chains(model, blocks, batch)
        reached = {name for chain in chains for name in chain.blocks}
        missing = [name for name in targets if name not in reached]
        if not missing:
            trimmed = [_trim(chain, targets) for chain in chains]
            return [chain for chain in trimmed if chain is not None]
    raise ValueError(
        f"No calibration batch runs all blocks that are to be pruned: {missing[:3]} got no input. Give batches that "
        "use them (images too, for a vision tower), or leave them out with exclude_modules or modalities."
    )


def _run(
    block: nn.Module,
    name: str,
    links: Mapping,
    captures: list[Capture],
    previous: list[list[Any]],
    note: _Collector | None,
) -> list[list[Any]]:
    """Call the block on every batch; the outputs of the last call of each."""
    outputs = []
    for captured, inputs in zip(captures, previous, strict=True):
        if note is not None:
            note.real_tokens = captured.real_tokens
        results = [run_block(block, call, links, inputs) for call in captured.calls.get(name, [])]
        outputs.append(results[-1] if results else [])
    return outputs


def _walk_chain(
    model: nn.Module,
    chain: Chain,
    captures: list[Capture],
    targets: TargetsByBlock,
    kind: type[Statistics],
    prune_block: PruneBlock,
    propagate: bool,
) -> None:
    outputs: list[list[Any]] = [[] for _ in captures]
    for name, links in zip(chain.blocks, chain.links, strict=True):
        block = model.get_submodule(name)
        block_targets = targets.get(name, ())
        collector = _Collector(block_targets, kind)
        with collector.collecting():
            after = _run(block, name, links, captures, outputs, collector)
        if block_targets:
            prune_block(block_targets, collector.statistics)
        if block_targets and propagate and name != chain.blocks[-1]:
            after = _run(block, name, links, captures, outputs, None)
        outputs = after
        for captured in captures:
            captured.calls.pop(name, None)


def walk_blocks(
    model: nn.Module,
    targets: TargetsByBlock,
    batches: Sequence[Batch],
    kind: type[Statistics],
    prune_block: PruneBlock,
    propagate: bool,
) -> None:
    """Give `prune_block` each block's targets with the statistics of their inputs, in the order the model runs them.

    Args:
        model: the model, in evaluation mode.
        targets: block name -> its modules to prune; a block outside of every stack is a single module.
        batches: calibration batches.
        kind: what is summed up; only one block's sums exist at a time.
        prune_block: prunes the modules it is given before the walk goes on.
        propagate: measure a block on what the pruned blocks before it give, instead of the dense ones.

    Raises:
        ValueError: a block or a module gets no input, or values that are not finite.
    """
    chains = _chains(model, targets, batches)
    # Dense inputs of later chains exist only before anything is pruned.
    dense = None if propagate else [capture(model, chain, batches) for chain in chains]
    for index, chain in enumerate(chains):
        captures = capture(model, chain, batches) if dense is None else dense[index]
        _walk_chain(model, chain, captures, targets, kind, prune_block, propagate)
