"""The walk over a model's blocks: statistics of one block, its masks, then on with what the block now gives.

1. `find_chains` shows which blocks run, in which order, and which of them form a chain: each runs on what the one
   before gives.
2. `capture`: the arguments that the blocks of a chain are called with are kept.
3. `walk_blocks`: the blocks are called again, one after the other, and pruned on the way.

No architecture is known here: a block is any module, and its arguments are whatever it was called with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..field_types import name_some
from ..tuners.variator.forward_context import single_blocks
from .chains import Batch, Call, Chain, find_chains, hooked, leaves, run_model
from .modules import PrunableModule, block_stacks, innermost
from .statistics import Statistics


__all__ = ["Capture", "Padding", "TargetsByBlock", "capture", "walk_blocks"]


@dataclass
class Padding:
    """Which positions of a batch are real tokens, bool (batch, length); `None`: nobody said.

    `own` is of the tower's tokens, `encoder` of those of the encoder that a decoder attends to.
    """

    own: Tensor | None = None
    encoder: Tensor | None = None


@dataclass
class Capture:
    """What one batch gives the blocks of a chain: a call for each, or several where a block runs several times."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    padding: Padding = field(default_factory=Padding)


class _StopForwardError(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _without_caches(call: Call) -> Call:
    """The call without key-value caches: a cache would grow with every replay."""
    for slot, value in call.items():
        if isinstance(value, Cache):
            call.fill(slot, None)
    return call


def _mask(given: Any, batch: Batch) -> Tensor | None:
    """A tower's mask of padding; the batch's where the tower has been given one that is made ready for attention."""
    if given is not None and not _is_mask(given):
        given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return given.bool() if _is_mask(given) else None


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


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
        call = Call(args, kwargs)
        own, encoder = (call.named(modules[name], key) for key in ("attention_mask", "encoder_attention_mask"))
        captures[-1].padding = Padding(_mask(own, batch), _mask(encoder, batch))

    def note_call(name: str, args: Any, kwargs: Any) -> None:
        call = _without_caches(Call(list(args), dict(kwargs)))
        for slot in links[name]:
            call.fill(slot, None)
        captures[-1].calls.setdefault(name, []).append(call.copied() if chain.writes else call)
        if name == chain.blocks[-1] and not chain.repeats:
            raise _StopForwardError

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if tower is not None:
            stack.enter_context(hooked({tower: modules[tower]}, note_mask))
        stack.enter_context(hooked({name: modules[name] for name in chain.blocks}, note_call))
        for batch in batches:
            given = batch.get("attention_mask") if tower is None and isinstance(batch, Mapping) else None
            captures.append(Capture(padding=Padding(_mask(given, batch))))
            try:
                run_model(model, batch)
            except _StopForwardError:
                pass
    return captures


PruneBlock = Callable[[Sequence[PrunableModule], dict[str, Statistics]], None]
TargetsByBlock = Mapping[str, Sequence[PrunableModule]]


class _Collector:
    """Sums up the inputs of some modules, module name -> statistics.

    Args:
        targets: the modules.
        kind: what is summed up.
        untold: gets the names of modules whose padding can't be told.
    """

    def __init__(self, targets: Sequence[PrunableModule], kind: type[Statistics], untold: list[str]) -> None:
        self._targets = {target.name: target for target in targets}
        self._kind = kind
        self._untold = untold
        self._padding = Padding()
        self._of_encoder: Any = None
        self._others: list[Tensor] = []
        self.statistics: dict[str, Statistics] = {}

    def expect(self, block: nn.Module, call: Call, padding: Padding) -> None:
        """The next inputs are those of one call of the block."""
        self._padding = padding
        self._of_encoder = call.named(block, "encoder_hidden_states")
        self._others = [value for _, value in call.items() if isinstance(value, Tensor)][1:]

    def _count(self, name: str, args: Any, kwargs: Any) -> None:
        inputs = next(iter([*args, *kwargs.values()]))
        if name not in self.statistics:
            self.statistics[name] = self._kind(self._targets[name].width, inputs.device)
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        real = self._real_tokens(name, inputs)
        self.statistics[name].add(rows if real is None else rows[real.reshape(-1).to(rows.device)])

    def _real_tokens(self, name: str, inputs: Tensor) -> Tensor | None:
        """Which positions of a module's inputs count, in their order; `None`: all."""
        if inputs is self._of_encoder:
            mask = self._padding.encoder
        else:
            mask = None if any(inputs is other for other in self._others) else self._padding.own
        positions = tuple(inputs.shape[:-1])
        if mask is None or bool(mask.all()):
            return None
        if positions in (tuple(mask.shape), (mask.numel(),)):
            return mask
        if positions == tuple(mask.t().shape):  # time first, as in XLNet
            return mask.t()
        # Pooled tokens are no padding. Of the tokens routed to an expert, which may be any, nothing tells.
        is_pooled = positions in ((len(mask),), (len(mask), 1))
        if not is_pooled and inputs.numel():
            self._untold.append(name)
        return None

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
    return replace(chain, blocks=chain.blocks[part], links=[{}, *chain.links[part][1:]])


def _chains(model: nn.Module, targets: TargetsByBlock, batches: Sequence[Batch]) -> list[Chain]:
    """The chains to walk, in the order in which the model runs them."""
    stacks = [stack for stack in block_stacks(model).values() if any(block in targets for block in stack)]
    names = list(dict.fromkeys([block for stack in stacks for block in stack] + list(targets)))
    chains = find_chains(model, {name: model.get_submodule(name) for name in names}, batches)
    reached = {name for chain in chains for name in chain.blocks}
    missing = [name for name in targets if name not in reached]
    if missing:
        raise ValueError(
            f"No calibration batch runs {name_some(missing)}, which are to be pruned. Give batches that use them "
            "(images too, for a vision tower), or leave them out with exclude_modules or modalities."
        )
    return [trimmed for chain in chains if (trimmed := _trim(chain, targets)) is not None]


def _run(
    model: nn.Module,
    name: str,
    chain: Chain,
    captures: list[Capture],
    previous: list[list[Any]],
    collector: _Collector | None = None,
) -> list[list[Any]]:
    """Call a block of the chain on every batch, on what the block before gave; the leaves that the last calls give."""
    block, links = model.get_submodule(name), chain.links[chain.blocks.index(name)]
    outputs = []
    for captured, given in zip(captures, previous, strict=True):
        output: list[Any] = []
        for call in captured.calls.get(name, []):
            for slot, index in links.items():
                call.fill(slot, given[index])
            own = call.copied() if chain.writes else call
            if collector is not None:
                collector.expect(block, own, captured.padding)
            with torch.no_grad(), single_blocks():  # the base model is calibrated, whatever plugins it carries
                output = leaves(block(*own.args, **own.kwargs))
            for slot in links:
                call.fill(slot, None)
        outputs.append(output)
    return outputs


def _walk_chain(
    model: nn.Module,
    chain: Chain,
    captures: list[Capture],
    targets: TargetsByBlock,
    kind: type[Statistics],
    prune_block: PruneBlock,
    propagate: bool,
    untold: list[str],
) -> None:
    outputs: list[list[Any]] = [[] for _ in captures]
    for name in chain.blocks:
        block_targets = targets.get(name, ())
        collector = _Collector(block_targets, kind, untold)
        with collector.collecting():
            after = _run(model, name, chain, captures, outputs, collector)
        if block_targets:
            prune_block(block_targets, collector.statistics)
        if block_targets and propagate and name != chain.blocks[-1]:
            after = _run(model, name, chain, captures, outputs)
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

    Warns:
        UserWarning: padding counted, as nothing tells where it lies in a module's inputs.
    """
    chains = _chains(model, targets, batches)
    untold: list[str] = []
    # Dense inputs of later chains exist only before anything is pruned.
    dense = None if propagate else [capture(model, chain, batches) for chain in chains]
    for index, chain in enumerate(chains):
        captures = capture(model, chain, batches) if dense is None else dense[index]
        _walk_chain(model, chain, captures, targets, kind, prune_block, propagate, untold)
    if untold:
        warnings.warn(
            f"The calibration batches have padding, and the inputs of {name_some(list(dict.fromkeys(untold)))} do not "
            "lie as their attention_mask does, so padding counted there. Give batches without padding: texts of one "
            "length, or one a batch.",
            stacklevel=3,
        )
