"""The walk over a model's blocks: statistics of one block, its masks, then on with what the block now gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Batch, hooked, run_block
from .capture import Capture, capture
from .chains import Chain, find_chains
from .modalities import block_stacks
from .statistics import Statistics
from .targets import PrunableModule


__all__ = ["walk_blocks"]

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
