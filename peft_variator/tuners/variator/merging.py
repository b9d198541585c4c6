"""Merging groups of neighbouring tokens into rows, and giving rows back to their tokens: the heart of the method.

A *row* is one vector that goes through the feed-forward network: a group of merged tokens, or one token by itself.
Three layouts share one interface, `merge` and its inverse `expand`:

- `SharedGroups`: every sequence is grouped alike and has no padding. Groups are strided views, nothing is gathered.
- `PackedGroups`: the real tokens of the batch are packed, and padding has no row.
- `BoundedGroups`: shapes depend on the shape of the batch alone, which compiled and captured code needs. Each sequence
  has as many rows as its tokens can need at most, and some of them are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


__all__ = ["Block", "BoundedGroups", "Groups", "MemberScores", "PackedGroups", "Part", "SharedGroups"]

GATHERED_SHARE = 0.8
"""Merged tokens are gathered for a correction, and added back, where at most this share of all tokens is merged."""


class Part:
    """Groups that are laid out in one way."""

    def members(self, tokens: Tensor) -> list[Tensor]:
        """The first, second, … member of every group.

        Args:
            tokens: shape `(batch, length, dim)`.

        Returns:
            As many tensors of shape `(*groups, dim)` as the largest group has members; 0 where one has fewer.
        """
        raise NotImplementedError

    def scores(self, scores: Tensor) -> Tensor:
        """The scores of every group's members, side by side.

        Args:
            scores: one for each token, shape `(batch, length, 1)`.

        Returns:
            Shape `(*groups, size)`.
        """
        raise NotImplementedError


MemberScores = Callable[[Part], Tensor]
"""What a scoring gives: the scores of the members of a part's groups, shape `(*groups, size)`."""


@dataclass
class Groups:
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
    _rows_that_merge: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _members_of_rows: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def merges(self) -> bool:
        """Whether any tokens share a row."""
        raise NotImplementedError

    @property
    def can_split(self) -> bool:
        """Whether rows of groups and rows of single tokens are told apart by where they lie."""
        return True

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of groups, and those of single tokens; the inverse of `join`.

        Args:
            rows: shape `(sequences, rows, dim)`, as `merge` gives them.

        Returns:
            Shapes `(sequences, groups, dim)` and `(sequences, singles, dim)`.
        """
        raise NotImplementedError

    def join(self, merged: Tensor, singles: Tensor) -> Tensor:
        """The rows, shape `(sequences, rows, dim)`; see `split`."""
        raise NotImplementedError

    def merge(self, tokens: Tensor, member_scores: MemberScores) -> Tensor:
        """The weighted mean of each group (Xiao et al. 2023, section 3.2), weights being a softmax inside the group.

        Args:
            tokens: hidden states, shape `(batch, length, dim)`.
            member_scores: gives the scores of each part's members. Not asked where nothing is merged.

        Returns:
            Shape `(sequences, rows, dim)` with `sequences * rows == num_rows`.
        """
        raise NotImplementedError

    def rows_that_merge(self) -> Tensor:
        """Which rows are shared by several tokens, shape `(num_rows, 1)`; found out once a call."""
        if self._rows_that_merge is None:
            none = torch.zeros(self.num_rows + 1, 1, dtype=torch.bool, device=self.row_of.device)
            self._rows_that_merge = none.index_copy(0, self.row_of, self.is_merged)[:-1]
        return self._rows_that_merge

    def members_of_rows(self) -> Tensor:
        """The token numbers of every row's members, found out once a call, for kernels.

        Returns:
            int32, shape `(num_rows, size)`; −1 where a row has fewer. An empty row may hold a token of another.
        """
        if self._members_of_rows is None:
            self._members_of_rows = self._list_members().int()
        return self._members_of_rows

    def _list_members(self) -> Tensor:
        raise NotImplementedError

    def merged_alone(self) -> Tensor | None:
        """Numbers of the tokens that share a row, where it pays to gather them; `None`: it does not.

        It does where many tokens are padding, are kept out, or are of a kind that is not merged.
        """
        return None

    def only_merged(self, inner: Tensor) -> Tensor:
        """Zeros in place of the vectors of tokens that share their row with no other, and of padding.

        Args:
            inner: shape `(batch * length, width)`. Where nothing trains it is written over: a copy would cost as much
                as reading it twice, and most tokens are merged.

        Returns:
            The shape of `inner`.
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and inner.requires_grad):
            return torch.where(self.is_merged, inner, 0)
        self._zero_others_(inner)
        return inner

    def _zero_others_(self, inner: Tensor) -> None:
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

    def expand(self, rows: Tensor, inner: Tensor, up: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """Give each token the vector of its row plus its own correction, `inner @ up.T`.

        Args:
            rows: shape `(num_rows, dim)`.
            inner: hidden layer of the correction, 0 at padding; shape `(batch * length, width)`.
            up: shape `(dim, width)`, or what computes the correction, where that is not a product with a plain tensor.

        Returns:
            Shape `(batch * length, dim)`, zero at padding.
        """
        # Into the spread rows: a second tensor of this size would cost more than the product.
        spread = self.spread(rows)
        return spread.addmm_(inner, up.t()) if isinstance(up, Tensor) else spread.add_(up(inner))


# Every sequence alike: strided views


@dataclass(frozen=True)
class Block(Part):
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

    def laid_out(self, tokens: Tensor) -> Tensor:
        """A view of the block's tokens, shape `(batch, *shape, dim)`, of tokens of shape `(batch, length, dim)`."""
        return tokens[:, self.start : self.start + self.length].unflatten(1, self.shape)

    def members(self, tokens: Tensor) -> list[Tensor]:
        """Views of the members; see [`Part`]."""
        block = self.laid_out(tokens)
        if len(self.shape) == 2:
            return list(block.unbind(2))
        return [column for row in block.unbind(2) for column in row.unbind(3)]

    def scores(self, scores: Tensor) -> Tensor:
        """The members' scores; see [`Part`]."""
        block = scores[:, self.start : self.start + self.length].view(scores.shape[0], *self.shape)
        return block if len(self.shape) == 2 else block.transpose(2, 3).flatten(3)

    def add_(self, tokens: Tensor, rows: Tensor) -> None:
        """Add to every member of a group the group's row, in place.

        Args:
            tokens: shape `(batch, length, dim)`.
            rows: shape `(batch, groups, dim)`.
        """
        self.laid_out(tokens).add_(rows.unflatten(1, self._grid))

    def rows(self, first: int, device: torch.device) -> Tensor:
        """The row of each token, for rows numbered from `first`; shape `(length,)`."""
        numbers = torch.arange(first, first + self.groups, device=device)
        return numbers.view(self._grid).expand(self.shape).reshape(-1)

    @property
    def _grid(self) -> list[int]:
        """The shape with one member in place of all."""
        return [count for extent in self.shape[::2] for count in (extent, 1)]


def _is_one_short_product(tokens: Tensor) -> bool:
    """Whether one product of matrices merges faster than a sum member by member does.

    It is one call in place of two a member, which is what counts for a single text; the strides of several sequences
    would have it copy them first, and in half precision such small products have no fast path on every processor.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which would hold on to the batch's size
        return False
    return tokens.shape[0] == 1 and tokens.dtype == torch.float32


@dataclass
class SharedGroups(Groups):
    """All sequences have the same blocks and none has padding."""

    blocks: Sequence[Block] = ()
    _merged: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, blocks: Sequence[Block], batch: int, device: torch.device) -> SharedGroups:
        """The groups of `batch` sequences that consist of these blocks, in order."""
        rows_per_sequence = sum(block.groups for block in blocks)
        row_of, is_merged, first = [], [], 0
        for block in blocks:
            row_of.append(block.rows(first, device))
            # An int: torch.jit.trace has no operator that fills with a bool.
            is_merged.append(torch.full((block.length,), int(block.size > 1), dtype=torch.bool, device=device))
            first += block.groups
        offsets = torch.arange(batch, device=device).unsqueeze(1) * rows_per_sequence
        return cls(
            num_rows=batch * rows_per_sequence,
            row_of=(torch.cat(row_of) + offsets).flatten(),
            is_merged=torch.cat(is_merged).repeat(batch).unsqueeze(1),
            all_real=True,
            blocks=tuple(blocks),
        )

    @property
    def merges(self) -> bool:
        return any(block.size > 1 for block in self.blocks)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = rows.split([block.groups for block in self.blocks], dim=1)
        merged = [part for part, block in zip(parts, self.blocks, strict=True) if block.size > 1]
        singles = [part for part, block in zip(parts, self.blocks, strict=True) if block.size == 1]
        none = [rows[:, :0]]
        return torch.cat(merged or none, dim=1), torch.cat(singles or none, dim=1)

    def join(self, merged: Tensor, singles: Tensor) -> Tensor:
        groups = iter(merged.split([block.groups for block in self.blocks if block.size > 1], dim=1))
        others = iter(singles.split([block.groups for block in self.blocks if block.size == 1], dim=1))
        return torch.cat([next(groups if block.size > 1 else others) for block in self.blocks], dim=1)

    @property
    def _length(self) -> int:
        """Tokens of a sequence."""
        return sum(block.length for block in self.blocks)

    def merged_alone(self) -> Tensor | None:
        merging, length = [block for block in self.blocks if block.size > 1], self._length
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # which would hold on to what was decided
            return None
        if not 0 < sum(block.length for block in merging) <= GATHERED_SHARE * length:
            return None
        if self._merged is None:
            device = self.row_of.device
            numbers = [torch.arange(block.start, block.start + block.length, device=device) for block in merging]
            starts = torch.arange(0, self.row_of.numel(), length, device=device).unsqueeze(1)
            self._merged = (starts + torch.cat(numbers)).flatten()
        return self._merged

    def merge(self, tokens: Tensor, member_scores: MemberScores) -> Tensor:
        return torch.cat([self._merge_block(block, tokens, member_scores) for block in self.blocks], dim=1)

    @staticmethod
    def _merge_block(block: Block, tokens: Tensor, member_scores: MemberScores) -> Tensor:
        if block.size == 1:
            return tokens[:, block.start : block.start + block.length]
        shares = member_scores(block).float().softmax(dim=-1).to(tokens.dtype)
        if _is_one_short_product(tokens) and len(block.shape) == 2:
            return torch.matmul(shares.unsqueeze(-2), block.laid_out(tokens)).squeeze(-2)
        members, weights = block.members(tokens), shares.unsqueeze(-2).unbind(-1)
        merged = members[0] * weights[0]
        for member, weight in zip(members[1:], weights[1:], strict=True):
            merged = torch.addcmul(merged, member, weight)
        return merged.flatten(1, -2)

    def _list_members(self) -> Tensor:
        length, size = self._length, max(block.size for block in self.blocks)
        numbers = torch.arange(self.row_of.shape[0], device=self.row_of.device).view(-1, length, 1)
        members = [block.scores(numbers).flatten(1, -2) for block in self.blocks]
        padded = [torch.nn.functional.pad(each, (0, size - each.shape[-1]), value=-1) for each in members]
        return torch.cat(padded, dim=1).flatten(0, 1)

    def _zero_others_(self, inner: Tensor) -> None:
        by_sequence = inner.view(-1, self._length, inner.shape[-1])
        for block in self.blocks:
            if block.size == 1:
                by_sequence[:, block.start : block.start + block.length].zero_()

    def expand(self, rows: Tensor, inner: Tensor, up: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        tokens = torch.nn.functional.linear(inner, up) if isinstance(up, Tensor) else up(inner)
        per_sequence = sum(block.groups for block in self.blocks)
        by_sequence = rows.view(rows.shape[0] // per_sequence, per_sequence, -1)
        target, first = tokens.view(by_sequence.shape[0], -1, tokens.shape[-1]), 0
        for block in self.blocks:
            block.add_(target, by_sequence[:, first : first + block.groups])
            first += block.groups
        return tokens


# Sequences that differ: gathered


@dataclass
class PackedGroups(Groups, Part):
    """The real tokens of a batch, whatever their number in each sequence.

    Args:
        member_of: token numbers of the merged groups, which are the first rows; shape `(groups, k)`. Empty slots
            repeat the group's first token.
        is_member: which slots are filled; shape `(groups, k)`.
        singles: token numbers of the rows that are one token each; shape `(singles,)`.
        others: token numbers of those that share their row with none, and of padding; `None`: `is_merged` alone tells.
        merged: token numbers of those that share their row; `None`: `is_merged` alone tells.
    """

    member_of: Tensor
    is_member: Tensor
    singles: Tensor
    others: Tensor | None = None
    merged: Tensor | None = None

    @property
    def merges(self) -> bool:
        return self.member_of.shape[0] > 0

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = self.member_of.shape[0]
        return rows[:, :groups], rows[:, groups:]

    def join(self, merged: Tensor, singles: Tensor) -> Tensor:
        return torch.cat([merged, singles], dim=1)

    def members(self, tokens: Tensor) -> list[Tensor]:
        groups, size = self.member_of.shape
        gathered = tokens.flatten(0, 1).index_select(0, self.member_of.flatten()).view(groups, size, -1)
        return list(gathered.masked_fill(~self.is_member.unsqueeze(-1), 0).unbind(1))

    def scores(self, scores: Tensor) -> Tensor:
        return scores.flatten()[self.member_of]

    def merge(self, tokens: Tensor, member_scores: MemberScores) -> Tensor:
        if not self.merges:
            return tokens.flatten(0, 1).index_select(0, self.singles).unsqueeze(0)
        weights = self._weights(member_scores(self), tokens.dtype)
        return _sum_bags(tokens.flatten(0, 1), self.member_of, weights, self.singles).unsqueeze(0)

    def merged_alone(self) -> Tensor | None:
        if self.merged is None or not 0 < self.merged.numel() <= GATHERED_SHARE * self.row_of.numel():
            return None
        return self.merged

    def _zero_others_(self, inner: Tensor) -> None:
        if self.others is None:
            inner.masked_fill_(~self.is_merged, 0)
        else:
            inner.index_fill_(0, self.others, 0)

    def _list_members(self) -> Tensor:
        singles = torch.nn.functional.pad(self.singles.unsqueeze(1), (0, self.member_of.shape[1] - 1), value=-1)
        return torch.cat([self.member_of.masked_fill(~self.is_member, -1), singles])

    def _weights(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """The softmax inside each group, 0 at empty slots; shape `(groups, k)`."""
        return scores.float().masked_fill(~self.is_member, -torch.inf).softmax(dim=-1).to(dtype)


def _sum_bags(tokens: Tensor, members: Tensor, weights: Tensor, singles: Tensor) -> Tensor:
    """The weighted sum of each group, `(groups, k)`, then the single tokens, in one pass; `(rows, dim)`."""
    groups, size = members.shape
    starts = torch.arange(groups, device=members.device) * size
    ends = torch.arange(singles.numel(), device=members.device) + groups * size
    return torch.nn.functional.embedding_bag(
        torch.cat([members.flatten(), singles]),
        tokens,
        torch.cat([starts, ends]),
        mode="sum",
        per_sample_weights=torch.cat([weights.flatten(), weights.new_ones(singles.numel())]),
    )


@dataclass
class BoundedGroups(PackedGroups):
    """As many rows for each sequence as it can need at most; every row is a group, empty ones hold a token of it.

    A token whose row lies beyond the bound has an index out of range, which stops the product that gathers it: nothing
    is ever cut off.
    """

    @classmethod
    def of(cls, row: Tensor, slot: Tensor, real: Tensor | None, rows: int, ratio: int) -> BoundedGroups:
        """The groups of sequences whose tokens know their row and their place in it.

        Args:
            row: of each token in its own sequence, shape `(batch, length)`.
            slot: place of each token among the members of its row, shape `(batch, length)`.
            real: which tokens are no padding, shape `(batch, length)`; `None`: all.
            rows: the bound, number of rows of each sequence.
            ratio: the compression ratio k.
        """
        batch, length = row.shape
        token = torch.arange(length, device=row.device).expand(batch, length)
        sequence = torch.arange(batch, device=row.device).view(batch, 1)
        # Padding goes to a row before the first, and a row beyond the bound nowhere: its index is out of range.
        place = row + 1 if real is None else torch.where(real, row + 1, 0)
        places = (sequence, place, slot)
        empty = torch.zeros(batch, rows + 1, ratio, dtype=torch.long, device=row.device)
        members = empty.index_put(places, token)[:, 1:]
        filled = empty.index_put(places, torch.ones_like(token))[:, 1:]
        row_of = row + sequence * rows
        is_merged = filled.sum(-1).gather(1, row.clamp(min=0)) > 1
        if real is not None:
            row_of, is_merged = torch.where(real, row_of, batch * rows), is_merged & real
        slots = torch.arange(ratio, device=row.device)
        return cls(
            num_rows=batch * rows,
            row_of=row_of.flatten(),
            is_merged=is_merged.view(-1, 1),
            all_real=real is None,
            member_of=(members + sequence.unsqueeze(-1) * length).flatten(0, 1),
            # The first slot of an empty row counts as filled, or its softmax would be over nothing.
            is_member=((filled > 0) | (slots == 0)).flatten(0, 1),
            singles=row.new_zeros(0),
        )

    @property
    def merges(self) -> bool:
        return True

    @property
    def can_split(self) -> bool:
        return False

    def merge(self, tokens: Tensor, member_scores: MemberScores) -> Tensor:
        weights = self._weights(member_scores(self), tokens.dtype)
        gathered = tokens.flatten(0, 1).index_select(0, self.member_of.flatten())
        gathered = gathered.unflatten(0, (-1, weights.shape[1]))
        return torch.bmm(weights.unsqueeze(1), gathered).transpose(0, 1)
