"""Which blocks of a model run one after the other, found out by watching a forward pass.

Hooks note which blocks run, in which order, and which of a block's outputs is, as the same tensor, an input of the
next block. Blocks linked in this way form a chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Batch, Call, Slot, hooked, leaves, run_model


__all__ = ["Chain", "find_chains"]


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
