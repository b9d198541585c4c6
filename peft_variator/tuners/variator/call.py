"""One forward call of a stack, as its plugins share it: what merges, and the groups of every rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .facts import CallFacts
from .grouping import Grouping
from .patch_groups import group_patches
from .rule import MergeRule
from .text_groups import group_text


__all__ = ["StackCall"]


@dataclass
class StackCall:
    """One forward call of a stack. Groupings are computed once and shared by all layers.

    Args:
        facts: what the call tells about its tokens.
        choices: the plugin and its rule of every module that merges in this call, by the module's name. Later changes
            do not touch them, so that a layer that is computed again in the backward does the same again.
        pending: what the start of a network leaves for its end, by the name of the module where it starts.
    """

    facts: CallFacts
    choices: Mapping[str, tuple[str, MergeRule]]
    pending: dict[str, Any] = field(default_factory=dict)
    _groupings: dict[tuple[MergeRule, torch.device], Grouping] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the groupings of all modules, if the arguments suffice, so that no layer has to.

        Raises:
            ValueError: a mask cannot be read, or text cannot be told from images.
        """
        if self.facts.tokens is not None:
            for rule in {rule for _, rule in self.choices.values()}:
                self._grouping_on(self.facts.tokens.device, rule, None)

    def grouping(self, rule: MergeRule, hidden_states: Tensor) -> Grouping:
        """The groups for one module.

        Args:
            rule: what that module merges.
            hidden_states: its input, shape `(batch, length, dim)` or `(batch * length, dim)`.

        Raises:
            ValueError: the hidden states do not have the length that the call's arguments tell, or nothing tells it.
        """
        grouping = self._grouping_on(hidden_states.device, rule, hidden_states)
        if grouping.row_of.numel() * hidden_states.shape[-1] != hidden_states.numel():
            raise ValueError(
                f"A Variator plugin got hidden states of shape {tuple(hidden_states.shape)}, but the call it belongs "
                f"to has {grouping.row_of.numel()} tokens. The feed-forward network has to see the whole sequence: "
                "set `chunk_size_feed_forward=0`, and call it only through the model."
            )
        return grouping

    def _grouping_on(self, device: torch.device, rule: MergeRule, hidden_states: Tensor | None) -> Grouping:
        """The grouping on the device of a layer, which need not be that of the arguments."""
        if (rule, device) not in self._groupings:
            tokens = self.facts.tokens
            if tokens is None:
                assert hidden_states is not None  # `prepare` asks only where the arguments suffice
                grouping = self._group(rule, _shape_of(hidden_states), device)
            else:
                grouping = self._group(rule, (tokens.shape[0], tokens.shape[1]), tokens.device)
            self._groupings[rule, device] = _on(device, grouping)
        return self._groupings[rule, device]

    def _group(self, rule: MergeRule, shape: tuple[int, int], device: torch.device) -> Grouping:
        group = group_patches if self.facts.kind == "vision" else group_text
        return group(self.facts, rule, shape, device)


def _shape_of(hidden_states: Tensor) -> tuple[int, int]:
    if hidden_states.dim() != 3:
        raise ValueError(
            f"A Variator plugin cannot tell which of the hidden states of shape {tuple(hidden_states.shape)} belong "
            "to one sequence: the call has no input_ids, inputs_embeds or attention_mask of shape (batch, length). "
            "Pass one of them to the model, or name the module that takes them in stack_module."
        )
    return hidden_states.shape[0], hidden_states.shape[1]


def _on(device: torch.device, grouping: Grouping) -> Grouping:
    """The grouping with its index tensors on a device."""
    moved: dict[str, Any] = {
        name: value.to(device)
        for name, value in vars(grouping).items()
        if isinstance(value, Tensor) and value.device != device
    }
    return replace(grouping, **moved) if moved else grouping
