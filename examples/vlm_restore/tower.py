"""Teach the vision tower to name shapes and colours, before a language model learns to speak of what it sees.

A LLaVA begins with a trained CLIP tower. Learned from the answers alone, through the language model, the tower sees
colours and no shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from data import COLORS, SHAPES, Example, stack_pixels
from torch import Tensor, nn
from torch.nn import functional as F


__all__ = ["NAMES", "Namer", "collate_names"]

NAMES = (SHAPES, COLORS)
UNKNOWN = -100


class Namer(nn.Module):
    """A vision tower with a linear classifier for each kind of name.

    Args:
        tower: the tower, a CLIP vision model.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, len(names)) for names in NAMES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy over the names that are known; `labels` has shape `(batch, kinds)`."""
        patches = self.tower(pixel_values).last_hidden_state[:, 1:].mean(1)
        losses = [
            F.cross_entropy(head(patches), labels[:, kind], ignore_index=UNKNOWN, reduction="sum")
            for kind, head in enumerate(self.heads)
        ]
        return {"loss": torch.stack(losses).sum() / (labels != UNKNOWN).sum().clamp(min=1)}


def collate_names(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Images, mirrored at random, with the names that their questions ask for."""
    labels = [[_name(example, names) for names in NAMES] for example in examples]
    return {"pixel_values": stack_pixels(examples, augment=True), "labels": torch.tensor(labels)}


def _name(example: Example, names: Sequence[str]) -> int:
    return next((names.index(answer) for _, answer in example.questions if answer in names), UNKNOWN)
