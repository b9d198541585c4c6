"""A plugin whose low-rank updates are part of the weights: for files and programs, whose ratio is fixed anyway.

A call of the model itself leaves W and B·A apart, since its next call may be the base model's; see
[`CompensatedLinear`]. What is exported has one ratio, and would multiply with B and A for nothing.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ...compat import is_plain_linear
from ...models import share_weights
from .base_reading import note_read, read_base
from .compensation import CompensatedLinear
from .forward_context import selection_of
from .hooks import StackForward, forward_of
from .layer import VariatorLayer, plugin_layers
from .linear_maps import RowsOfBase, as_linear


__all__ = ["fold_updates"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold_updates(model: Model) -> Model:
    """A copy of a model to export, in which a plugin's low-rank updates are summed into the weights they belong to.

    With `compensation_rank` these are the maps of blocks whose plugin merges, W + B·A, and with `correction_rank` the
    base model's rows in the correction, W_S + B·A. The copy shares all other weights with the model, which stays as
    it is, and has its plugin and ratio for good: it raises an error where another one is chosen. At k = 1 there is
    nothing to sum.

    Left apart are updates of maps that are quantised, packed, in half precision (where the sum would round the update
    away) or under another adapter, and those of causal models, whose single tokens are the base model's.

    Args:
        model: a model with a Variator plugin, from `get_peft_model`, `get_base_model` or `load_adapter`.

    Returns:
        The copy, to be exported and not to be saved or trained.

    Raises:
        ValueError: the model has no plugin, or the call stands inside of a `using_ratio` block.
    """
    layers = list(plugin_layers(model))
    if not layers:
        raise ValueError(f"A {type(model).__name__} without a Variator plugin has no updates to sum up.")
    if any(selection_of(layer.ratios) is not None for layer in layers):
        raise ValueError(
            "fold_updates stands inside of a using_ratio block, and a ratio for good is no choice of one thread. "
            "Choose it with set_compression_ratio, outside of the block."
        )
    copied = share_weights(model)
    for module in copied.modules():
        forward = forward_of(module)
        if isinstance(forward, StackForward):
            forward.fix_choices()
    for layer in plugin_layers(copied):
        _fold_correction(layer)  # first: it may read the maps of the network, which are the base model's still
    sums: dict[int, nn.Module] = {}
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if isinstance(module, CompensatedLinear):
            if id(module) not in sums:
                sums[id(module)] = _summed(module)
            copied.set_submodule(name, sums[id(module)])
    for layer in plugin_layers(copied):
        _look_again(layer)
    return copied


def _plugin_of(stack: object, network: str) -> str | None:
    """The plugin that a network merges with for good; `None`: it merges nothing."""
    choices = stack.fixed_choices if isinstance(stack, StackForward) else None
    return choices[network][0] if choices and network in choices else None


def _summed(module: CompensatedLinear) -> nn.Module:
    """What takes the place of a map with an update; the map itself where its update has to stay apart."""
    stack = module.stack
    name = _plugin_of(stack, module.network_name)
    if name not in module.adapters() or (isinstance(stack, StackForward) and stack.kind == "causal"):
        return module
    down, up = module.factors(name)
    quantized = module.quantized_sum(name, up)
    if quantized is not None:
        return quantized
    base = module.base_layer
    if not is_plain_linear(base) or base.weight.dtype not in (torch.float32, torch.float64):
        return module
    if not base.weight.dtype == down.dtype == up.dtype or base.weight.is_meta:
        return module
    return module.summed(name).train(module.training)


def _fold_correction(layer: VariatorLayer) -> None:
    """Have the correction of the plugin that a layer merges with consist of plain maps."""
    name = _plugin_of(layer.stack, layer.name)
    if name is None:
        return
    read_base(layer, name)
    for part, module in layer.modules_of(name).items():
        if isinstance(module, RowsOfBase):
            getattr(layer, part)[name] = module.quantized_map() or as_linear(module.weight, module.bias)


def _look_again(layer: VariatorLayer) -> None:
    """Have a layer know its network's maps, which may be others now, and that there is nothing more to read."""
    name = _plugin_of(layer.stack, layer.name)
    if name is None:
        return
    layer.find_plain_network(name)
    network = layer.network()
    if network is not None:
        note_read(layer, name, network)
