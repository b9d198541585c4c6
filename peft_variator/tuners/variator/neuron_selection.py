"""Choosing by data which neurons of its networks a plugin copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .decompression import NeuronsDecompression
from .layer import VariatorLayer, plugin_layers
from .merging import Groups
from .network import Network
from .neurons import copy_neurons, has_left_its_start
from .ratios import using_ratio


__all__ = ["calibrate", "needs_calibration"]


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Choose which neurons the active plugin copies: those whose output varies most inside of groups.

    For each network, S is the neurons with the largest E[‖v_j‖²·(a_j(x) − a_j(m))²] over the tokens x that share a row
    with others, m being the mean of their group, on the hidden states of the base model. The copies are then the base
    model's neurons again, so this comes before training. Where several processes train, all of them call it, each with
    batches of its own.

    Args:
        model: a model whose active plugin has `decompression="neurons"` and a compression ratio above 1.
        batches: arguments of the model's call, by name; tensors are moved to the model's device.

    Raises:
        ValueError: the model has no such plugin, its weights have left their start, or the batches have no tokens to
            merge. Nothing has been changed.
    """
    row = _widest_row(model)
    layers = _layers_to_calibrate(model, row)
    spreads = {
        layer.name: torch.zeros(network.width, dtype=torch.float64, device=_device_of(layer))
        for layer, _, network in layers
    }
    networks = {layer.name: network for layer, _, network in layers}

    def observe(layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        if layer.name in networks:
            spreads[layer.name] += _spread(layer, networks[layer.name], hidden_states, groups, plugin)

    device, training = next(model.parameters()).device, model.training
    try:
        model.eval()
        for layer in plugin_layers(model):
            layer.observer = observe
        with torch.no_grad(), nullcontext() if row is None else using_ratio(model, row):
            for batch in batches:
                model(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()})
    finally:
        for layer in plugin_layers(model):
            layer.observer = None
        model.train(training)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for spread in spreads.values():
            torch.distributed.all_reduce(spread)
    if not all(bool(spread.any()) for spread in spreads.values()):
        raise ValueError("calibrate: the batches have no tokens that are merged. Pass longer texts, and more of them.")
    for layer, plugin, network in layers:
        modules = layer.modules_of(plugin)
        width = modules["variator_neurons"].get_buffer("index").numel()
        copy_neurons(modules, network, spreads[layer.name].topk(width).indices.sort().values)
        modules["variator_neurons"].is_calibrated = True  # type: ignore[assignment]  # a NeuronIndex


def needs_calibration(model: nn.Module) -> bool:
    """Whether the active plugin is new and copies neurons that were chosen without data."""
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        if plugin is None or layer.decompressions[plugin] != NeuronsDecompression.name:
            continue
        modules, network = layer.modules_of(plugin), layer.network()
        is_new = not layer.configs[plugin].was_saved and not modules["variator_neurons"].is_calibrated
        if is_new and network is not None and network.is_readable and not has_left_its_start(modules, network):
            return layer.rule_at(plugin, _widest_row(model) or layer.ratios.chosen.get(plugin)).ratio > 1
    return False


def _widest_row(model: nn.Module) -> int | None:
    """The row of the active plugin's schedule that leaves least alone; `None`: it has none, and its ratio counts."""
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        schedule = None if plugin is None else layer.configs[plugin].ratio_schedule
        if schedule:
            return max(schedule)
    return None


def _layers_to_calibrate(model: nn.Module, row: int | None) -> list[tuple[VariatorLayer, str, Network]]:
    found = []
    for layer in plugin_layers(model):
        plugin, network = layer.active_plugin, layer.network()
        if plugin is None or layer.decompressions[plugin] != NeuronsDecompression.name:
            continue
        if layer.rule_at(plugin, row or layer.ratios.chosen.get(plugin)).ratio == 1:
            continue
        if network is None or not network.is_readable:
            raise ValueError(
                f"calibrate: the weights of {layer.name} cannot be read. Calibrate on the base as it was."
            )
        if has_left_its_start(layer.modules_of(plugin), network):
            raise ValueError(
                f"calibrate: the plugin {plugin!r} has been trained, and choosing its neurons again would undo that "
                f"({layer.name}). Calibrate before the first step, or make a new plugin."
            )
        found.append((layer, plugin, network))
    if not found:
        raise ValueError(
            "calibrate: the model has no active Variator plugin with decompression='neurons' and a compression ratio "
            "above 1. Nothing else is chosen by data."
        )
    return found


def _device_of(layer: VariatorLayer) -> torch.device:
    return next(layer.parameters()).device


def _spread(layer: VariatorLayer, network: Network, hidden_states: Tensor, groups: Groups, plugin: str) -> Tensor:
    """Sum over merged tokens of ‖v_j‖²·(a_j(x) − a_j(m))², shape `(width,)`."""
    rows = layer.compress(hidden_states, groups, plugin).flatten(0, -2)
    differences = network.neurons(hidden_states.flatten(0, -2)) - groups.spread(network.neurons(rows))
    squares = torch.where(groups.is_merged, differences.double().square(), 0).sum(0)
    return squares * network.out_columns(torch.arange(network.width)).double().square().sum(0)
