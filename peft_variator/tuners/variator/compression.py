"""A plugin's arithmetic: a group of vectors to one, and the network's output of a group back to its tokens.

Xiao et al. 2023 (https://arxiv.org/abs/2310.15724), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .grouping import Grouping


__all__ = ["compress", "expand"]


def compress(hidden_states: Tensor, grouping: Grouping, scorer: nn.Module) -> Tensor:
    """Merge each group into one vector.

    Args:
        hidden_states: shape `(batch, length, dim)` or `(batch * length, dim)`.
        grouping: the groups.
        scorer: linear map to scores; without a bias from one token to its own, else from all k of a group to theirs.

    Returns:
        Shape `(sequences, rows, dim)`.
    """
    tokens = hidden_states if hidden_states.dim() == 3 else hidden_states.unsqueeze(0)
    weight, bias = _parameters(scorer, tokens.dtype)
    if not grouping.merges:
        # Data parallelism waits for a gradient of every parameter, also from a batch with nothing to merge.
        return grouping.merge(tokens, None, None) + 0 * sum(p.sum() for p in (weight, bias) if p is not None)
    if bias is None:
        return grouping.merge(tokens, linear(tokens, weight), None)
    return grouping.merge(tokens, None, torch.cat([weight, bias.unsqueeze(1)], dim=1))


def expand(
    output: Tensor,
    hidden_states: Tensor,
    grouping: Grouping,
    down_input: nn.Module,
    down_output: nn.Module,
    up: nn.Module,
) -> Tensor:
    """Give every token of a group the group's output and its own correction; a token by itself has none.

    Args:
        output: output of the feed-forward network, shape `(sequences, rows, dim)`.
        hidden_states: its input before merging, shape `(batch, length, dim)` or `(batch * length, dim)`.
        grouping: the groups.
        down_input: linear map from a token's input to the correction's hidden layer.
        down_output: the same from the output of its group.
        up: linear map from the hidden layer to the correction.

    Returns:
        The shape of `hidden_states`; zero at padding.
    """
    rows, tokens = output.flatten(0, -2), hidden_states.flatten(0, -2)
    per_row = linear(rows, *_parameters(down_output, rows.dtype))
    per_token = linear(tokens, *_parameters(down_input, tokens.dtype))
    # Masked before the tanh: a token by itself, and padding, get tanh(0) = 0 and so no correction.
    inner = torch.where(grouping.is_merged, per_token + grouping.spread(per_row), 0).tanh()
    weight, _ = _parameters(up, inner.dtype)
    return grouping.expand(rows.to(inner.dtype), inner, weight).view(hidden_states.shape)


def _parameters(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear map in the dtype of its input: the small plugin follows the activations."""
    assert isinstance(module, nn.Linear)  # what `VariatorLayer.update_layer` builds
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
