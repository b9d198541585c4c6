"""Which image patches share a row, from what a call tells and the rule of a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .facts import CallFacts
from .group import share_blocks, share_patches
from .grouping import Grouping
from .rule import MergeRule


__all__ = ["group_patches"]


def group_patches(facts: CallFacts, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Grouping:
    """The grouping of a vision encoder's tokens; patches follow a prefix of other tokens.

    Args:
        facts: what the call tells.
        rule: what the module merges.
        shape: `(batch, length)`.
        device: where the index tensors are made.
    """
    batch, length = shape
    grid = _patch_grid(facts, length)
    prefix = rule.keep_first if grid is None else length - grid[0] * grid[1]
    if grid is not None and rule.windows:
        return share_patches(prefix, grid, rule.ratio, batch, device)
    runs = [(count, may_merge) for count, may_merge in ((prefix, False), (length - prefix, True)) if count > 0]
    grouping = share_blocks(runs, rule.ratio, batch, device)
    assert grouping is not None  # two runs never are too many
    return grouping


def _patch_grid(facts: CallFacts, length: int) -> tuple[int, int] | None:
    """Patches of the image, `(height, width)`; `None` where the image's own size does not tell."""
    pixels = facts.arguments.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or facts.patch_size is None:
        return None
    height, width = pixels.shape[-2] // facts.patch_size[0], pixels.shape[-1] // facts.patch_size[1]
    return (height, width) if height * width <= length else None
