"""Which neighbouring tokens form a group, as pure functions over masks.

A *row* is one vector that goes through the feed-forward network: a group of merged tokens, or one token by itself.
Two groupings share one interface. `SharedGrouping` serves batches in which every sequence is grouped alike: its groups
are strided views, so nothing is gathered. `PackedGrouping` serves everything else: the real tokens of the batch are
packed, and padding has no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


__all__ = ["Block", "Grouping", "PackedGrouping", "SharedGrouping", "pack", "share_blocks", "share_patches"]

# More pieces than this are cheaper to gather than to walk through one by one.
MAX_BLOCKS = 8


@dataclass(frozen=True)
class Block:
    """Consecutive tokens that are grouped in one way, alike in every sequence.

    Args:
        start: position of the first token.
        shape: how the tokens are laid out, `(groups, size)` for text, or `(rows, height, columns, width)` for image
            patches in windows of `height × width`. A size of 1 stands for tokens that are not merged.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def size(self) -> int:
        """Number of tokens in one group."""
        return int(torch.Size(self.shape[1::2]).numel())

    @property
    def groups(self) -> int:
        """Number of groups in one sequence."""
        return int(torch.Size(self.shape[::2]).numel())

    def members(self, tokens: Tensor) -> list[Tensor]:
        """Views of the first, second, … member of every group.

        Args:
            tokens: tensor of shape `(batch, length, dim)`.

        Returns:
            `size` views of shape `(batch, *grid, dim)`, where `grid` holds `groups` entries.
        """
        block = tokens[:, self.start : self.start + self.length].unflatten(1, self.shape)
        if len(self.shape) == 2:
            return list(block.unbind(2))
        return [column for row in block.unbind(2) for column in row.unbind(3)]

    def add_(self, tokens: Tensor, rows: Tensor) -> None:
        """Add to every member of a group the group's row, in place.

        Args:
            tokens: shape `(batch, length, dim)`.
            rows: shape `(batch, groups, dim)`.
        """
        block = tokens[:, self.start : self.start + self.length].unflatten(1, self.shape)
        grid = [count for extent in self.shape[::2] for count in (extent, 1)]
        block.add_(rows.unflatten(1, grid))

    def rows(self, first: int, device: torch.device) -> Tensor:
        """The row of each token, for rows numbered from `first`; shape `(length,)`."""
        numbers = torch.arange(first, first + self.groups, device=device)
        grid = numbers.view([count for extent in self.shape[::2] for count in (extent, 1)])
        return grid.expand(self.shape).reshape(-1)


@dataclass
class Grouping:
    """What a plugin needs to know about the groups of a batch, with tokens numbered through the flattened batch.

    Args:
        num_rows: number of rows that go through the feed-forward network.
        row_of: the row of every token, `num_rows` for padding; shape `(batch * length,)`.
        is_merged: whether a token shares its row with others; shape `(batch * length, 1)`.
        all_real: whether no token is padding.
    """

    num_rows: int
    row_of: Tensor
    is_merged: Tensor
    all_real: bool

    def merge(self, tokens: Tensor, scores: Tensor | None, concat: Tensor | None) -> Tensor:
        """The weighted mean of each group (Xiao et al. 2023, section 3.2), weights being a softmax inside the group.

        Args:
            tokens: hidden states, shape `(batch, length, dim)`.
            scores: one score per token, shape `(batch, length, 1)`; or `None` where `concat` gives them.
            concat: weights of shape `(k, k * dim + 1)`, the last column the bias, that map the concatenated members of
                a group to their scores; or `None`.

        Returns:
            Shape `(sequences, rows, dim)` with `sequences * rows == num_rows`.
        """
        raise NotImplementedError

    def spread(self, rows: Tensor) -> Tensor:
        """Give each token the vector of its row, and padding zeros.

        Args:
            rows: shape `(num_rows, dim)`.

        Returns:
            Shape `(batch * length, dim)`.
        """
        if not self.all_real:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
        return rows.index_select(0, self.row_of)

    def add_rows_(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Add to each token the vector of its row, in place.

        Args:
            tokens: shape `(batch * length, dim)`.
            rows: shape `(num_rows, dim)`.

        Returns:
            `tokens`.
        """
        return tokens.add_(self.spread(rows))


@dataclass
class SharedGrouping(Grouping):
    """A grouping in which all sequences have the same blocks and none has padding."""

    blocks: Sequence[Block] = ()

    def merge(self, tokens: Tensor, scores: Tensor | None, concat: Tensor | None) -> Tensor:
        # Some models hand their feed-forward networks the flattened batch.
        length = sum(block.length for block in self.blocks)
        tokens = tokens.reshape(-1, length, tokens.shape[-1])
        scores = scores if scores is None else scores.reshape(-1, length, 1)
        return torch.cat([self._merge_block(block, tokens, scores, concat) for block in self.blocks], dim=1)

    @staticmethod
    def _merge_block(block: Block, tokens: Tensor, scores: Tensor | None, concat: Tensor | None) -> Tensor:
        if block.size == 1:
            return tokens[:, block.start : block.start + block.length]
        members = block.members(tokens)
        if concat is None:
            assert scores is not None  # one of the two is given: the caller chose by `VariatorConfig.scoring`
            logits = torch.cat(block.members(scores), dim=-1)
        else:
            logits = _concat_scores(members, concat)
        weights = logits.float().softmax(dim=-1).to(tokens.dtype).unsqueeze(-2).unbind(-1)
        merged = members[0] * weights[0]
        for member, weight in zip(members[1:], weights[1:], strict=True):
            merged = torch.addcmul(merged, member, weight)
        return merged.flatten(1, -2)

    def add_rows_(self, tokens: Tensor, rows: Tensor) -> Tensor:
        per_sequence = sum(block.groups for block in self.blocks)
        by_sequence = rows.view(rows.shape[0] // per_sequence, per_sequence, -1)
        target, first = tokens.view(by_sequence.shape[0], -1, tokens.shape[-1]), 0
        for block in self.blocks:
            own = by_sequence[:, first : first + block.groups]
            block.add_(target, own)
            first += block.groups
        return tokens


def _concat_scores(members: list[Tensor], concat: Tensor) -> Tensor:
    """Scores of a group's members from their concatenation; a group that is not full has its missing members at 0."""
    dim = members[0].shape[-1]
    logits = concat[:, -1]
    for slot, member in enumerate(members):
        logits = logits + torch.nn.functional.linear(member, concat[:, slot * dim : (slot + 1) * dim])
    return logits[..., : len(members)]


@dataclass
class PackedGrouping(Grouping):
    """A grouping of the real tokens of a batch, whatever their number in each sequence.

    Args:
        members: token numbers of the merged groups, which are the first rows; shape `(groups, k)`. Empty slots repeat
            the group's first token.
        is_member: which slots are filled; shape `(groups, k)`.
        singles: token numbers of the rows that are one token each; shape `(singles,)`.
    """

    members: Tensor
    is_member: Tensor
    singles: Tensor

    def merge(self, tokens: Tensor, scores: Tensor | None, concat: Tensor | None) -> Tensor:
        tokens = tokens.flatten(0, 1)
        single = tokens.index_select(0, self.singles)
        groups, size = self.members.shape
        if groups == 0:
            return single.unsqueeze(0)
        gathered = tokens.index_select(0, self.members.flatten()).view(groups, size, -1)
        if concat is None:
            assert scores is not None  # one of the two is given: the caller chose by `VariatorConfig.scoring`
            logits = scores.flatten()[self.members]
        else:
            present = gathered.masked_fill(~self.is_member.unsqueeze(-1), 0)
            logits = torch.nn.functional.linear(present.flatten(1), concat[:, :-1], concat[:, -1])
        weights = logits.float().masked_fill(~self.is_member, -torch.inf).softmax(dim=-1).to(tokens.dtype)
        merged = torch.bmm(weights.unsqueeze(1), gathered).squeeze(1)
        return torch.cat([merged, single]).unsqueeze(0)


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


def _text_blocks(start: int, length: int, ratio: int) -> list[Block]:
    """Blocks of a run of `length` tokens that may be merged: full groups, then what is left over as a smaller one."""
    full, rest = divmod(length, ratio)
    blocks = [Block(start, (full, ratio))] if full else []
    return [*blocks, Block(start + full * ratio, (1, rest))] if rest else blocks


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
        blocks += _text_blocks(position, length, ratio) if may_merge else [Block(position, (length, 1))]
        position += length
    if not blocks or len(blocks) > MAX_BLOCKS:
        return None
    return _from_blocks(blocks, batch, device)


def window_of(ratio: int) -> tuple[int, int]:
    """The most nearly square window of `ratio` patches, as `(height, width)` with `height <= width`."""
    height = max(divisor for divisor in range(1, int(ratio**0.5) + 1) if ratio % divisor == 0)
    return height, ratio // height


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
