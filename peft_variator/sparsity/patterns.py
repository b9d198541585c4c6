"""Which weights stay: choosing masks from scores, unstructured or n:m, and checking a weight for an n:m pattern.

A mask is a bool tensor of the weight's shape, True where the weight is kept. Weights are seen as matrices
(out_features, in_features); an n:m pattern runs along the inputs, the dimension that a matrix product sums over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # torch is imported where it is needed: the command line's help lists the methods without it
    import torch
    from torch import Tensor


__all__ = ["Pattern", "Target", "apply_mask", "check_width", "keep_largest", "meets_pattern", "prune_counts", "select"]


@dataclass(frozen=True)
class Pattern:
    """An n:m pattern: at most `kept` of every `group` consecutive inputs of a row are non-zero (arXiv 2104.08378).

    `Pattern.parse("2:4")` keeps 2 of 4. `kept` and `group` are counts of weights, 1 <= kept < group.
    """

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `"n:m"`.

        Raises:
            ValueError: `text` is not two whole numbers n:m with 1 <= n < m.
        """
        match = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", str(text).strip())
        if match is None or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError(
                f"pattern={text!r} is not an n:m pattern: it takes two whole numbers with 1 <= n < m, n weights kept "
                "of every m, for example '2:4' or '4:8'."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """The fraction of weights removed: 0.5 for 2:4."""
        return 1.0 - self.kept / self.group

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


Target = float | Pattern
"""What one weight is pruned to: the fraction of weights removed, or an n:m pattern."""


def check_width(name: str, width: int, pattern: Pattern) -> None:
    """Raise ValueError unless the `width` inputs of module `name` split into whole groups of `pattern`."""
    if width % pattern.group:
        raise ValueError(
            f"pattern={str(pattern)!r} does not divide the width of {name!r}: its {width} inputs are no multiple of "
            f"{pattern.group}. Leave it out with exclude_modules, or choose a pattern whose m divides {width}."
        )


def prune_counts(total: int, parts: int, target: float, device: torch.device | None = None) -> Tensor:
    """How many weights each of `parts` equal parts loses, so that round(target * total) are lost in all.

    The parts differ by at most one: rounding each row by itself would miss the target on narrow weights.

    Returns:
        int64 tensor (parts,).
    """
    import torch

    lost = int(target * total + 0.5)
    edges = torch.arange(parts + 1, device=device, dtype=torch.int64) * lost // max(parts, 1)
    return edges.diff()


def keep_largest(scores: Tensor, lost: Tensor | int) -> Tensor:
    """Mask of each row's largest scores.

    Args:
        scores: (rows, columns).
        lost: how many of each row's smallest scores are dropped, (rows,) or one number. Of equal scores the first go.

    Returns:
        bool (rows, columns), True where kept.
    """
    import torch

    order = scores.argsort(dim=1, stable=True)
    counts = torch.as_tensor(lost, device=scores.device).reshape(-1, 1)
    kept = torch.arange(scores.shape[1], device=scores.device) >= counts
    return torch.empty_like(scores, dtype=torch.bool).scatter_(1, order, kept.expand_as(order))


def select(scores: Tensor, target: Target, per_row: bool) -> Tensor:
    """Mask of the weights with the largest scores.

    Args:
        scores: (out_features, in_features).
        target: fraction removed, or an n:m pattern, which is always chosen inside each group.
        per_row: compare a weight with those of its own output (Wanda, arXiv 2306.11695, section 3) instead of with the
            whole matrix.

    Returns:
        bool (out_features, in_features), True where kept.

    Raises:
        ValueError: the pattern does not divide in_features.
    """
    if scores.numel() == 0:
        return scores.bool()
    if isinstance(target, Pattern):
        check_width("the weight", scores.shape[1], target)
        groups = scores.reshape(-1, target.group)
        return keep_largest(groups, target.group - target.kept).view_as(scores)
    rows = scores if per_row else scores.reshape(1, -1)
    return keep_largest(rows, prune_counts(scores.numel(), len(rows), target, scores.device)).view_as(scores)


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` with the weights outside `mask` at zero, every zero +0.0.

    A product with the mask would leave -0.0 where the weight is negative, and 2:4 kernels read stored -0.0 as values.
    """
    return weight.masked_fill(~mask | (weight == 0), 0.0)


def meets_pattern(matrix: Tensor, pattern: Pattern) -> bool:
    """Whether no group of `matrix` (out_features, in_features) has more than `pattern.kept` non-zero weights."""
    if matrix.shape[1] % pattern.group:
        return False
    groups = (matrix != 0).reshape(-1, pattern.group)
    return bool((groups.sum(dim=1) <= pattern.kept).all())
