"""How much each block loses: ECoFLaP's budgets, shared out over all towers until a global target is met exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .targets import PrunableModule


__all__ = ["spread_budgets", "water_fill"]


def water_fill(
    scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, highest: float
) -> dict[str, float]:
    """Sparsity of each block so that together they lose `sparsity` of their weights.

    A block keeps at least 1 - `highest` of its weights. What else is kept is shared out in proportion to the blocks'
    scores; a block that is full takes no more and the rest goes to the others (the coarse step of ECoFLaP, arXiv
    2310.02998: how much a part keeps follows its share of the global importance). Unlike in the released code the
    level is solved for, so the target is met to rounding instead of by rounds of additions with a repair.

    Args:
        scores: block -> importance summed over its weights, >= 0.
        sizes: block -> number of weights.
        sparsity: fraction of all weights removed, at most `highest`.
        highest: largest fraction removed from a block.

    Returns:
        block -> fraction removed, in [0, `highest`].

    Raises:
        ValueError: a score is negative or not finite, or none is positive.
    """
    names = list(sizes)
    score = torch.tensor([scores[name] for name in names], dtype=torch.float64)
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    if not torch.isfinite(score).all() or (score < 0).any() or not (score > 0).any():
        raise ValueError(
            f"Block scores must be finite and not negative, with one above 0, but are {dict(scores)}. The loss on the "
            "calibration data does not depend on the weights, or overflows: check the labels and the dtype."
        )
    floor = size * (1.0 - highest)
    kept = floor + _fill(score, size - floor, float(size.sum() * (1.0 - sparsity) - floor.sum()))
    return dict(zip(names, (1.0 - kept / size).clamp(0.0, highest).tolist(), strict=True))


def _fill(score: torch.Tensor, room: torch.Tensor, amount: float) -> torch.Tensor:
    """Share `amount` out as min(room, level * score); blocks without score share what is left by their room."""
    filled = torch.zeros_like(room)
    open_ = score > 0
    while open_.any() and amount > 0:
        share = torch.where(open_, score / score[open_].sum() * amount, 0.0)
        full = open_ & (share >= room)
        if not full.any():
            return filled + share
        filled = torch.where(full, room, filled)
        amount -= float(room[full].sum())
        open_ &= ~full
    rest = torch.where(score > 0, 0.0, room)
    total = float(rest.sum())
    return filled + rest * (max(amount, 0.0) / total) if total > 0 else filled


def spread_budgets(targets: Sequence[PrunableModule], budgets: Mapping[str, float]) -> list[PrunableModule]:
    """The targets with their block's sparsity, each module to a whole number of weights.

    The roundings are carried from module to module, so that their sum is off by less than one weight.
    """
    spread, wanted, lost = [], 0.0, 0
    for target in targets:
        size = target.module.weight.numel()
        wanted += budgets[target.block] * size
        count = min(max(int(wanted + 0.5) - lost, 0), size - 1)
        lost += count
        spread.append(replace(target, target=count / size))
    return spread
