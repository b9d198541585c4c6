"""Which blocks of a model feed the next, read from forward passes: what can be run again block by block, and what not.

A block is any module, and its arguments are whatever it is called with; no architecture is known here. `find_chains`
runs the model and looks at three things:

- which of a block's outputs is, as the very same tensor, an argument of the next block;
- which arguments are computed from outputs of other blocks (what is added between blocks, skip connections): what the
  model does between blocks is followed tensor by tensor;
- whether a block changes what it is given in place.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..compat import tensor_version, tree_leaves, tree_map
from ..models import on_device


__all__ = ["Batch", "Call", "Chain", "Slot", "find_chains", "hooked", "leaves", "run_model"]

Batch = Mapping[str, Any] | Tensor
Slot: TypeAlias = int | str
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

    def named(self, block: nn.Module, name: str) -> Any:
        """The argument that the block's forward calls `name`; `None`: it was given none."""
        try:
            return signature(block.forward).bind_partial(*self.args, **self.kwargs).arguments.get(name)
        except (TypeError, ValueError):  # a forward that can't be read
            return self.kwargs.get(name)

    def copied(self) -> Call:
        """The call with tensors of its own, however deep they lie."""
        copies = {id(leaf): leaf.clone() for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)}
        args, kwargs = tree_map(lambda leaf: copies.get(id(leaf), leaf), (self.args, self.kwargs))
        return Call(args, kwargs)


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
    """`model` on one calibration batch, moved to where its first weights are, and without a key-value cache."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    without_cache = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    return model(**on_device({**batch, **without_cache}, device))


@dataclass
class Chain:
    """Blocks that run one after the other, each on the outputs of the one before.

    `links[i]` says, for block i, which slot takes which leaf of block i-1's output; empty for the first block.
    `repeats`: it is one block that runs several times. `writes`: a block, or the model between blocks, changes
    arguments in place, so that each call needs its own.
    """

    blocks: list[str]
    links: list[dict[Slot, int]]
    repeats: bool = False
    writes: bool = False


@dataclass
class _Run:
    """One call of a block: its links to the block that ran before, and whose outputs else its arguments come from."""

    name: str
    before: str | None
    links: dict[Slot, int]
    sources: frozenset[str]
    arguments: list[tuple[weakref.ref[Tensor], int]]
    writes: bool = False

    def note_writes(self) -> None:
        """Look whether arguments have been changed in place since the call began."""
        self.writes |= any(
            (tensor := ref()) is not None and tensor_version(tensor) != noted for ref, noted in self.arguments
        )


def _links(call: Call, previous: Sequence[tuple[Any, int]]) -> dict[Slot, int]:
    """Which arguments are outputs of the block before; empty unless its first tensor is the call's first tensor."""
    found = {
        slot: index
        for slot, value in call.items()
        for index, (leaf, noted) in enumerate(previous)
        if isinstance(value, Tensor) and value is leaf and tensor_version(value) == noted
    }
    tensors = [slot for slot, value in call.items() if isinstance(value, Tensor)]
    return found if tensors and found.get(tensors[0]) == 0 else {}


class _Recorder(TorchFunctionMode):
    """Notes the calls of blocks in a forward pass, and from which blocks' outputs the model computes what else."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[_Run] = []
        self._sources: MutableMapping[Tensor, frozenset[str]] = WeakIdKeyDictionary()
        self._previous: list[tuple[Any, int]] = []
        self._in_block = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._in_block:
            return func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        sources = self._sources_of(given)
        noted = [tensor_version(tensor) for tensor in given]
        result = func(*args, **(kwargs or {}))
        if sources:
            written = [tensor for tensor, before in zip(given, noted, strict=True) if tensor_version(tensor) != before]
            whole = [tensor._base for tensor in written if tensor._base is not None]
            for tensor in [*_tensors(result), *written, *whole]:
                self._sources[tensor] = self._sources.get(tensor, frozenset()) | sources
        return result

    def _sources_of(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._sources.get(tensor, frozenset()) for tensor in tensors))

    def before(self, name: str, args: Any, kwargs: Any) -> None:
        """Note a call; nothing is followed for as long as the block runs."""
        self._in_block = True
        call = Call(list(args), dict(kwargs))
        links = _links(call, self._previous)
        others = [value for slot, value in call.items() if slot not in links]
        arguments = [(weakref.ref(tensor), tensor_version(tensor)) for tensor in _tensors((call.args, call.kwargs))]
        previous = self.runs[-1].name if self.runs else None
        self.runs.append(_Run(name, previous, links, self._sources_of(_tensors(others)), arguments))

    def after(self, name: str, args: Any, output: Any) -> None:
        """Note what the block gives, and follow it from here."""
        self.runs[-1].note_writes()
        self._previous = [(leaf, tensor_version(leaf) if isinstance(leaf, Tensor) else 0) for leaf in leaves(output)]
        for tensor in _tensors(output):
            self._sources[tensor] = frozenset({name})
        self._in_block = False


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _record(model: nn.Module, blocks: Mapping[str, nn.Module], batch: Batch) -> list[_Run]:
    """The calls of `blocks` when `model` runs on `batch`, in their order."""
    recorder = _Recorder()
    with torch.no_grad(), hooked(blocks, recorder.before, recorder.after), recorder:
        output = run_model(model, batch)
        for run in recorder.runs:
            run.note_writes()
        del output  # what it holds had to live until here
    return recorder.runs


def find_chains(model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> list[Chain]:
    """Run the batches through `model` and find the chains its blocks form, in the order they run.

    A block continues a chain if in every batch that runs it, it runs once, right after the block before it and on the
    very output of that, while no other argument is computed from what the chain's blocks give. Any other block begins
    a new chain; one that runs several times is a chain by itself. Blocks that no batch runs are in none.

    Args:
        model: the model, in evaluation mode.
        blocks: name -> module; none lies in another.
        batches: calibration batches. The order is that of the first batch that runs the most blocks.
    """
    runs = [_record(model, blocks, batch) for batch in batches]
    by_name: dict[str, list[_Run]] = {}
    for run in (run for batch in runs for run in batch):
        by_name.setdefault(run.name, []).append(run)
    repeated = {name for batch in runs for name, count in Counter(run.name for run in batch).items() if count > 1}
    chains: list[Chain] = []
    for name in dict.fromkeys(run.name for batch in sorted(runs, key=_reached, reverse=True) for run in batch):
        own = by_name[name]
        writes = any(run.writes for run in own)
        if chains and _continues(chains[-1], own, repeats=name in repeated):
            chains[-1].blocks.append(name)
            chains[-1].links.append(own[0].links)
            chains[-1].writes |= writes
        else:
            chains.append(Chain([name], [{}], name in repeated, writes))
    return chains


def _reached(runs: Sequence[_Run]) -> int:
    return len({run.name for run in runs})


def _continues(chain: Chain, runs: Sequence[_Run], repeats: bool) -> bool:
    """Whether a block's calls, of all batches, go on from the last block of a chain."""
    if repeats or chain.repeats or not runs[0].links:
        return False
    return all(
        run.before == chain.blocks[-1] and run.links == runs[0].links and run.sources.isdisjoint(chain.blocks)
        for run in runs
    )
