"""Which product every packed layer of a model runs, and why."""

from __future__ import annotations

import torch
from torch import nn

from .linear import Sparse24Linear


__all__ = ["describe_path", "describe_paths"]


def describe_path(layer: Sparse24Linear, dtype: torch.dtype | None = None, device: torch.device | None = None) -> str:
    """What the forward of a packed layer does and the reason, in one clause without a full stop.

    Args:
        layer: the layer.
        dtype: dtype of the product; that of the layer by default.
        device: where it is computed; where the layer is by default.
    """
    choice = layer.kernel(dtype, device)
    if choice.kernel != "dense":
        return f"sparse tensor cores ({choice.kernel}), because {choice.reason}"
    if layer.unpacked == "always" and not layer.offloaded:
        return f"a dense weight that is unpacked once and kept, because unpacked='always', and {choice.reason}"
    return f"unpack into a buffer, because {choice.reason}"


def describe_paths(model: nn.Module) -> dict[str, str]:
    """`describe_path` of every packed layer of a model, by the layer's name; empty for a dense model."""
    modules = model.named_modules()
    return {name: describe_path(module) for name, module in modules if isinstance(module, Sparse24Linear)}
