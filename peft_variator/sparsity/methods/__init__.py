"""Pruning methods: what each needs to know of a layer's inputs, and how it gets from that to a mask.

A method is one entry of `METHODS`; its mathematics is pure functions on tensors in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import PruningConfig
from ..patterns import Target, apply_mask
from ..statistics import GramStatistics, InputStatistics, Statistics
from .dsnot import dsnot_refine
from .magnitude import magnitude_mask
from .sparsegpt import sparsegpt_prune
from .wanda import wanda_mask


__all__ = ["METHODS", "Method", "dsnot_refine", "magnitude_mask", "sparsegpt_prune", "wanda_mask"]

Solver = Callable[[Tensor, Any, Target, PruningConfig], tuple[Tensor, Tensor]]
"""(weight (out, in), statistics of its inputs, target, config) -> mask and new weight, both (out, in)."""


@dataclass(frozen=True)
class Method:
    """A pruning method. `statistics` is None for methods that look at nothing but the weight."""

    statistics: type[Statistics] | None
    solve: Solver


def _masked(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask, apply_mask(weight, mask)


def _magnitude(weight: Tensor, statistics: None, target: Target, config: PruningConfig) -> tuple[Tensor, Tensor]:
    return _masked(weight, magnitude_mask(weight, target))


def _wanda(
    weight: Tensor, statistics: InputStatistics, target: Target, config: PruningConfig
) -> tuple[Tensor, Tensor]:
    return _masked(weight, wanda_mask(weight, statistics.norm, target))


def _sparsegpt(
    weight: Tensor, statistics: GramStatistics, target: Target, config: PruningConfig
) -> tuple[Tensor, Tensor]:
    return sparsegpt_prune(weight, statistics.gram, target, config.damping, config.block_size)


def _dsnot(
    weight: Tensor, statistics: InputStatistics, target: Target, config: PruningConfig
) -> tuple[Tensor, Tensor]:
    initial, _ = METHODS[config.initial_method].solve(weight, statistics, target, config)
    refined = dsnot_refine(weight, initial, statistics, target, config.max_cycles, config.error_threshold)
    return _masked(weight, refined)


METHODS: dict[str, Method] = {
    "magnitude": Method(None, _magnitude),
    "wanda": Method(InputStatistics, _wanda),
    "sparsegpt": Method(GramStatistics, _sparsegpt),
    "dsnot": Method(InputStatistics, _dsnot),
}
