"""Groups of neighbouring tokens: how a batch is merged into rows, and how rows reach their tokens again.

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

from .blocks import Block


__all__ = ["Grouping", "PackedGrouping", "SharedGrouping"]


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

    @property
    def merges(self) -> bool:
        """Whether any tokens share a row."""
        raise NotImplementedError

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

    def expand(self, rows: Tensor, inner: Tensor, up: Tensor) -> Tensor:
        """Give each token the vector of its row plus its own correction, `inner @ up.T`.

        Args:
            rows: shape `(num_rows, dim)`.
            inner: hidden layer of the correction, 0 at padding; shape `(batch * length, bottleneck_dim)`.
            up: shape `(dim, bottleneck_dim)`.

        Returns:
            Shape `(batch * length, dim)`, zero at padding.
        """
        # Into the spread rows: a second tensor of this size would cost more than the product.
        return self.spread(rows).addmm_(inner, up.t())


@dataclass
class SharedGrouping(Grouping):
    """A grouping in which all sequences have the same blocks and none has padding."""

    blocks: Sequence[Block] = ()

    @property
    def merges(self) -> bool:
        return any(block.size > 1 for block in self.blocks)

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

    def expand(self, rows: Tensor, inner: Tensor, up: Tensor) -> Tensor:
        tokens = torch.nn.functional.linear(inner, up)
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

    @property
    def merges(self) -> bool:
        return self.members.shape[0] > 0

    def merge(self, tokens: Tensor, scores: Tensor | None, concat: Tensor | None) -> Tensor:
        tokens = tokens.flatten(0, 1)
        if not self.merges:
            return tokens.index_select(0, self.singles).unsqueeze(0)
        if concat is None:
            assert scores is not None  # one of the two is given: the caller chose by `VariatorConfig.scoring`
            logits = scores.flatten()[self.members]
        else:
            logits = self._concat_scores(tokens, concat)
        weights = logits.float().masked_fill(~self.is_member, -torch.inf).softmax(dim=-1).to(tokens.dtype)
        return _sum_bags(tokens, self.members, weights, self.singles).unsqueeze(0)

    def _concat_scores(self, tokens: Tensor, concat: Tensor) -> Tensor:
        groups, size = self.members.shape
        gathered = tokens.index_select(0, self.members.flatten()).view(groups, size, -1)
        present = gathered.masked_fill(~self.is_member.unsqueeze(-1), 0).flatten(1)
        # No sequence may be long enough to fill a group.
        return torch.nn.functional.linear(present, concat[:size, : present.shape[1]], concat[:size, -1])


def _sum_bags(tokens: Tensor, members: Tensor, weights: Tensor, singles: Tensor) -> Tensor:
    """The weighted sum of each group, then the single tokens, gathered and summed in one pass.

    Args:
        tokens: shape `(batch * length, dim)`.
        members: token numbers, shape `(groups, k)`.
        weights: shape `(groups, k)`.
        singles: token numbers, shape `(singles,)`.

    Returns:
        Shape `(groups + singles, dim)`.
    """
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
