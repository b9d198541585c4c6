"""Which tokens share a row, as pure functions from runs, patch grids and masks to groupings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Block, text_blocks, window_of
from .grouping import Grouping, PackedGrouping, SharedGrouping


__all__ = ["group_runs", "pack", "share_blocks", "share_patches"]

# More pieces than this are cheaper to gather than to walk through one by one.
MAX_BLOCKS = 8


def share_blocks(runs: Sequence[tuple[int, bool]], ratio: int, batch: int, device: torch.device) -> Grouping | None:
    """The grouping of sequences that all look alike and have no padding.

    Args:
        runs: lengths of the runs of tokens, in order, each with whether its tokens may be merged.
        ratio: the compression ratio k.
        batch: number of sequences.
        device: where the index tensors are made.

    Returns:
        The grouping, or `None` where there are so many runs that packing is cheaper.
    """
    blocks: list[Block] = []
    position = 0
    for length, may_merge in runs:
        blocks += text_blocks(position, length, ratio) if may_merge else [Block(position, (length, 1))]
        position += length
    if not blocks or len(blocks) > MAX_BLOCKS:
        return None
    return _from_blocks(blocks, batch, device)


def share_patches(
    prefix: int, grid: tuple[int, int], ratio: int, batch: int, device: torch.device
) -> SharedGrouping | PackedGrouping:
    """The grouping of image patches in windows; windows at the right and lower edge may be cut off.

    Args:
        prefix: number of tokens before the patches (class token, registers), which are never merged.
        grid: number of patches, `(height, width)`.
        ratio: the compression ratio k; see [`window_of`].
        batch: number of images.
        device: where the index tensors are made.
    """
    (height, width), (tall, wide) = grid, window_of(ratio)
    if height % tall == 0 and width % wide == 0:
        blocks = [Block(0, (prefix, 1))] if prefix else []
        return _from_blocks([*blocks, Block(prefix, (height // tall, tall, width // wide, wide))], batch, device)
    rows = torch.arange(height, device=device).unsqueeze(1)
    columns = torch.arange(width, device=device)
    windows = (rows // tall * -(-width // wide) + columns // wide).flatten() + prefix
    group_of = torch.cat([torch.arange(prefix, device=device), windows])
    offsets = torch.arange(batch, device=device).unsqueeze(1) * int(group_of.max() + 1)
    return pack((group_of + offsets).flatten(), torch.arange(group_of.numel() * batch, device=device), ratio)


def _from_blocks(blocks: Sequence[Block], batch: int, device: torch.device) -> SharedGrouping:
    rows_per_sequence = sum(block.groups for block in blocks)
    row_of, is_merged, first = [], [], 0
    for block in blocks:
        row_of.append(block.rows(first, device))
        is_merged.append(torch.full((block.length,), block.size > 1, device=device))
        first += block.groups
    offsets = torch.arange(batch, device=device).unsqueeze(1) * rows_per_sequence
    return SharedGrouping(
        num_rows=batch * rows_per_sequence,
        row_of=(torch.cat(row_of) + offsets).flatten(),
        is_merged=torch.cat(is_merged).repeat(batch).unsqueeze(1),
        all_real=True,
        blocks=tuple(blocks),
    )


def group_runs(starts_run: Tensor, may_merge: Tensor, ratio: int) -> Tensor:
    """Number the groups of packed tokens: `ratio` neighbours each, never across the start of a run.

    Args:
        starts_run: whether a token must not share a group with the one before it; shape `(tokens,)`.
        may_merge: whether a token may be merged at all; shape `(tokens,)`.
        ratio: the compression ratio k.

    Returns:
        The group of each token, counted from 0; shape `(tokens,)`.
    """
    position = torch.arange(starts_run.numel(), device=starts_run.device)
    run_start = torch.where(starts_run, position, 0).cummax(0).values
    starts_group = starts_run | ~may_merge | ((position - run_start) % ratio == 0)
    return starts_group.cumsum(0) - 1


def pack(group_of: Tensor, token_of: Tensor, ratio: int, num_tokens: int | None = None) -> PackedGrouping:
    """The grouping of packed tokens whose groups are numbered.

    Args:
        group_of: the group of each real token, numbered from 0 without gaps; shape `(tokens,)`.
        token_of: the number of each real token in the flattened batch; shape `(tokens,)`.
        ratio: the compression ratio k, the largest size of a group.
        num_tokens: `batch * length`, padding included; `None` where there is no padding.
    """
    sizes = torch.bincount(group_of)
    is_merged = sizes > 1
    num_merged = int(is_merged.sum())
    # Merged groups are numbered before single tokens, so that the former are one slice of the rows.
    row = torch.where(is_merged, is_merged.cumsum(0) - 1, num_merged + (~is_merged).cumsum(0) - 1)[group_of]
    order = torch.argsort(row, stable=True)
    merged_tokens = int(sizes[is_merged].sum())
    members, is_member = _fill_slots(row[order[:merged_tokens]], token_of[order[:merged_tokens]], num_merged, ratio)
    total = token_of.numel() if num_tokens is None else num_tokens
    row_of = torch.full((total,), sizes.numel(), device=row.device).index_copy(0, token_of, row)
    return PackedGrouping(
        num_rows=sizes.numel(),
        row_of=row_of,
        is_merged=(row_of < num_merged).unsqueeze(1),
        all_real=total == token_of.numel(),
        members=members,
        is_member=is_member,
        singles=token_of[order[merged_tokens:]],
    )


def _fill_slots(row: Tensor, token_of: Tensor, groups: int, ratio: int) -> tuple[Tensor, Tensor]:
    """The tokens of each merged group, side by side, and which of the slots they fill."""
    position = torch.arange(row.numel(), device=row.device)
    starts = torch.ones_like(row, dtype=torch.bool)
    starts[1:] = row[1:] != row[:-1]
    slot = position - torch.where(starts, position, 0).cummax(0).values if row.numel() else position
    members = token_of[starts].unsqueeze(1).repeat(1, ratio)
    members[row, slot] = token_of
    is_member = torch.zeros(groups, ratio, dtype=torch.bool, device=row.device)
    is_member[row, slot] = True
    return members, is_member
