"""Runs of tokens that are grouped alike in every sequence, as strided views of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


__all__ = ["Block", "text_blocks", "window_of"]


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


def text_blocks(start: int, length: int, ratio: int) -> list[Block]:
    """Blocks of a run of `length` tokens that may be merged: full groups, then what is left over as a smaller one."""
    full, rest = divmod(length, ratio)
    blocks = [Block(start, (full, ratio))] if full else []
    return [*blocks, Block(start + full * ratio, (1, rest))] if rest else blocks


def window_of(ratio: int) -> tuple[int, int]:
    """The most nearly square window of `ratio` patches, as `(height, width)` with `height <= width`."""
    height = max(divisor for divisor in range(1, int(ratio**0.5) + 1) if ratio % divisor == 0)
    return height, ratio // height
