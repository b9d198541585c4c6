"""How a row's output is given back to its tokens: one class a decompression.

`VariatorConfig(decompression=…)` chooses one by name. To add one, write a subclass of [`Decompression`] here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .config import VariatorConfig
from .merging import Groups


__all__ = ["DECOMPRESSIONS", "BottleneckDecompression", "Decompression"]


class Decompression:
    """Gives every token of a group the network's output for the group, and a correction of its own.

    A token by itself has no correction. The weights of a plugin are modules by the names of `parts`: in a plugin's
    file, a tensor's name starts with that of its part.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def create(self, dim: int, config: VariatorConfig) -> dict[str, nn.Module]:
        """The weights of a plugin, by part.

        Args:
            dim: d, width of the hidden states.
            config: the plugin's configuration.
        """
        raise NotImplementedError

    def expand(
        self, output: Tensor, hidden_states: Tensor, groups: Groups, modules: Mapping[str, nn.Module]
    ) -> Tensor:
        """What every token gets.

        Args:
            output: output of the feed-forward network, shape `(sequences, rows, d)`.
            hidden_states: its input before merging, shape `(batch, length, d)` or `(batch * length, d)`.
            groups: the groups.
            modules: what `create` made.

        Returns:
            The shape of `hidden_states`; zero at padding.
        """
        raise NotImplementedError


class BottleneckDecompression(Decompression):
    """The paper's: `Linear(2d → r), tanh, Linear(r → d)` on the row's output and the token's input, side by side.

    Xiao et al. 2023, section 3.2. The first map is split in two, so that the part of the output is computed once for a
    group: W[y; x] = W₁·y + W₂·x.
    """

    name = "bottleneck"
    parts = ("variator_down_input", "variator_down_output", "variator_up")

    def create(self, dim: int, config: VariatorConfig) -> dict[str, nn.Module]:
        up = nn.Linear(config.bottleneck_dim, dim, bias=False)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        return {
            "variator_down_input": nn.Linear(dim, config.bottleneck_dim, bias=False),
            "variator_down_output": nn.Linear(dim, config.bottleneck_dim),
            "variator_up": up,
        }

    def expand(
        self, output: Tensor, hidden_states: Tensor, groups: Groups, modules: Mapping[str, nn.Module]
    ) -> Tensor:
        rows, tokens = output.flatten(0, -2), hidden_states.flatten(0, -2)
        per_row = _linear(modules["variator_down_output"], rows)
        per_token = _linear(modules["variator_down_input"], tokens)
        # Masked before the tanh: a token by itself, and padding, get tanh(0) = 0 and so no correction.
        inner = torch.where(groups.is_merged, per_token + groups.spread(per_row), 0).tanh()
        up = modules["variator_up"]
        assert isinstance(up, nn.Linear)  # what `create` made
        return groups.expand(rows.to(inner.dtype), inner, up.weight.to(inner.dtype)).view(hidden_states.shape)


DECOMPRESSIONS: dict[str, Decompression] = {
    decompression.name: decompression() for decompression in (BottleneckDecompression,)
}
"""All decompressions by the name that `VariatorConfig` takes."""


def _linear(module: nn.Module, inputs: Tensor) -> Tensor:
    """A linear map in the dtype of its input: the small plugin follows the activations."""
    assert isinstance(module, nn.Linear)  # what `create` made
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return linear(inputs, module.weight.to(inputs.dtype), bias)
