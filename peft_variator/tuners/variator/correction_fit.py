"""Fitting what copied neurons write by least squares, before a plugin is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer import VariatorLayer, plugin_layers
from .linear_maps import UpdatedRows
from .merging import Groups
from .network import Network
from .neuron_selection import (
    Calibrated,
    check_outside_of_blocks,
    checked_ratios,
    copied_by,
    device_of,
    layers_to_calibrate,
    nothing_merges,
    rows_that_merge,
    run_batches_at,
    sum_over_processes,
)


__all__ = ["fit_correction", "needs_fit"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""That `fit_correction` chooses from, as shares of the neurons' mean square."""
_MAX_SUMS = 1 << 27
"""Numbers that `fit_correction` sums at a time, 1 GiB; of more layers than these allow, the batches run again."""


def fit_correction(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], ratios: Sequence[int] | None = None
) -> None:
    """Fit by least squares what the copied neurons of the active plugin write, so that training starts nearer its end.

    For each network, v is what makes Σ‖F(x) − y(x)‖² least over the tokens x that share a row with others, on the
    hidden states of the base model: F is the network, y what the plugin gives in its place (as channels that were
    pruned are made good for by those that stay: He, Zhang and Sun 2017, https://arxiv.org/abs/1707.06168, section
    3.1). A ridge draws v to the base model's; it is chosen by a quarter of the tokens that the fit has not seen, and
    where none does better on these than the base model's v, that is kept. With `correction_rank` it is the best
    update of v of that rank. It comes after `calibrate`, which chooses the neurons, and before training. Where several
    processes train, all of them call this, each with batches of its own.

    Args:
        model: a model whose active plugin has `decompression="neurons"` and a compression ratio above 1.
        batches: arguments of the model's call, by name; tensors are moved to the model's device.
        ratios: compression ratios, or rows of its schedule, that are fitted together, each on its share of the
            batches; `None`: the plugin's own.

    Raises:
        ValueError: the model has no such plugin, its weights have left their start, a ratio is none to merge by, or
            the batches have no tokens to merge; or the call stands inside of a `using_ratio` block. Nothing has been
            changed.
        TypeError: a batch is not a mapping, or has arrays of NumPy in place of tensors; or `ratios` is no sequence.
    """
    check_outside_of_blocks(model, "fit_correction")
    rows = checked_ratios("fit_correction", ratios) or rows_that_merge(model)
    layers = layers_to_calibrate(model, rows, "fit_correction")
    if not layers:
        raise ValueError(
            "fit_correction: the model has no active Variator plugin with decompression='neurons' and a compression "
            "ratio above 1. There is nothing to fit."
        )
    batches = list(batches)
    found = [changes for chunk in _in_chunks(layers) for changes in _fit_chunk(model, batches, chunk, rows)]
    for (layer, plugin, _), changes in zip(layers, found, strict=True):
        _set(layer.modules_of(plugin)["variator_neuron_out"], changes)


def needs_fit(model: nn.Module, ratios: Sequence[int] | None = None) -> bool:
    """Whether the active plugin is new and copies neurons that are still the base model's.

    Args:
        model: the model.
        ratios: as for `fit_correction`.
    """
    plugins = ((layer, layer.active_plugin) for layer in plugin_layers(model))
    if any(plugin is not None and layer.configs[plugin].was_saved for layer, plugin in plugins):
        return False
    try:
        return bool(layers_to_calibrate(model, ratios or rows_that_merge(model), "fit_correction"))
    except ValueError:
        return False


def _in_chunks(layers: list[Calibrated]) -> Iterator[list[Calibrated]]:
    """The layers, as many at a time as their sums have room."""
    chunk: list[Calibrated] = []
    room = _MAX_SUMS
    for each in layers:
        layer, plugin, _ = each
        width = copied_by(layer, plugin).numel()
        size = 2 * width * (width + layer.in_features)
        if chunk and size > room:
            yield chunk
            chunk, room = [], _MAX_SUMS
        chunk.append(each)
        room -= size
    yield chunk


class _Moments:
    """Sums over tokens that a linear regression is solved from, of those that fit it and of those that choose.

    Args:
        inputs: z, how many numbers the regression is on.
        outputs: e, how many it gives.
        device: where the sums are.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.squares = torch.zeros(2, inputs, inputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(2, inputs, outputs, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Count tokens: z, shape `(tokens, inputs)`, and e, shape `(tokens, outputs)`; the last quarter chooses."""
        self.tokens += inputs.shape[0]
        cut = 3 * inputs.shape[0] // 4
        with torch.autocast(inputs.device.type, enabled=False):
            for part, z, e in ((0, inputs[:cut], errors[:cut]), (1, inputs[cut:], errors[cut:])):
                self.squares[part] += z.t() @ z
                self.products[part] += z.t() @ e

    def solve(self) -> Tensor | None:
        """The map that makes the errors least, shape `(inputs, outputs)`; `None`: none does better than nothing."""
        maps = {ridge: self._solved(ridge, slice(0, 1)) for ridge in RIDGES}
        gains = {ridge: self._gain(weight) for ridge, weight in maps.items() if weight is not None}
        gains = {ridge: gain for ridge, gain in gains.items() if 0 < gain < math.inf}
        return self._solved(max(gains, key=gains.__getitem__), slice(0, 2)) if gains else None

    def regularised(self, ridge: float, parts: slice = slice(0, 2)) -> Tensor:
        """Σ zᵀz with a ridge, shape `(inputs, inputs)`."""
        squares = self.squares[parts].sum(0)
        level = squares.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        return squares + ridge * level * torch.eye(squares.shape[0], dtype=squares.dtype, device=squares.device)

    def factor(self, ridge: float, parts: slice = slice(0, 2)) -> Tensor | None:
        """The lower triangle L with L·Lᵀ = `regularised`; `None`: rounding, or what is not finite, leaves none."""
        factor, failed = torch.linalg.cholesky_ex(self.regularised(ridge, parts))
        return None if bool(failed) or not bool(factor.isfinite().all()) else factor

    def _solved(self, ridge: float, parts: slice) -> Tensor | None:
        factor = self.factor(ridge, parts)
        return None if factor is None else torch.cholesky_solve(self.products[parts].sum(0), factor)

    def _gain(self, weight: Tensor) -> float:
        """What the tokens that choose lose of their squared errors by a map."""
        return float(2 * (weight * self.products[1]).sum() - (weight * (self.squares[1] @ weight)).sum())


def _fit_chunk(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], layers: list[Calibrated], rows: Sequence[int | None]
) -> list[dict[str, Tensor]]:
    """What each layer's last map becomes, by parameter; nothing where it stays as it is."""
    networks = {layer.name: network for layer, _, network in layers}
    moments = {
        layer.name: _Moments(copied_by(layer, plugin).numel(), layer.in_features, device_of(layer))
        for layer, plugin, _ in layers
    }

    def observe(layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        if layer.name in networks:
            moments[layer.name].add(*_regression(layer, networks[layer.name], hidden_states, groups, plugin))

    # By turns: they share one regression, so that several ratios need no more batches than one.
    turns = range(max(len(batches), len(rows)) if batches else 0)
    for number, row in enumerate(rows):
        own = [batches[turn % len(batches)] for turn in turns if turn % len(rows) == number]
        run_batches_at(model, own, [row], observe)
    sum_over_processes(sums for each in moments.values() for sums in (each.squares, each.products, each.tokens))
    if not all(bool(each.tokens) for each in moments.values()):
        raise nothing_merges("fit_correction")
    for name, each in moments.items():
        if not bool(each.products.isfinite().all()):
            warnings.warn(
                f"fit_correction: {name} gives values that are not finite on these batches, so what its copied "
                "neurons write stays as it is.",
                stacklevel=3,
            )
    return [
        _changes(layer.modules_of(plugin)["variator_neuron_out"], moments[layer.name]) for layer, plugin, _ in layers
    ]


def _regression(
    layer: VariatorLayer, network: Network, hidden_states: Tensor, groups: Groups, plugin: str
) -> tuple[Tensor, Tensor]:
    """What v is multiplied by, shape `(tokens, r)`, and what y still lacks, `(tokens, d)`, of merged tokens."""
    index = copied_by(layer, plugin)
    rows = network.neurons(layer.compress(hidden_states, groups, plugin).flatten(0, -2))
    merged = groups.is_merged.squeeze(-1).nonzero().squeeze(-1)
    tokens = network.neurons(hidden_states.flatten(0, -2).index_select(0, merged))
    of_tokens = tokens[:, index].float()
    differences = of_tokens - groups.spread(rows[:, index])[merged].float()
    errors = network.out(tokens).float() - groups.spread(network.out(rows))[merged].float()
    with torch.autocast(errors.device.type, enabled=False):
        errors -= differences @ network.out_columns(index).t().to(errors)
    is_sliced = layer.configs[plugin].correction_form == "sliced"
    return of_tokens if is_sliced else differences, errors


def _changes(out: nn.Module, moments: _Moments) -> dict[str, Tensor]:
    """What the copies' last map becomes; where it has a rank, the update that comes nearest on the tokens seen."""
    delta = moments.solve()
    if delta is None:
        return {}
    if not isinstance(out, UpdatedRows):
        weight = out.get_parameter("weight").detach()
        return {"weight": weight + delta.t().to(weight)}
    factor = next(factor for ridge in RIDGES if (factor := moments.factor(ridge)) is not None)  # one has solved it
    left, sizes, right = torch.linalg.svd(factor.t() @ delta, full_matrices=False)
    rank = min(out.A.shape[0], sizes.numel())
    down, up = out.A.detach().clone(), torch.zeros_like(out.B)
    ups = right[:rank].t()
    downs = torch.linalg.solve_triangular(factor.t(), left[:, :rank] * sizes[:rank], upper=True).t()
    balance = (downs.norm() / ups.norm()).sqrt().clamp(min=1e-12)  # they train alike
    down[:rank], up[:, :rank] = (downs / balance).to(down), (ups * balance).to(up)
    return {"A": down, "B": up}


def _set(out: nn.Module, changes: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in changes.items():
            out.get_parameter(name).copy_(value)
    if isinstance(out, UpdatedRows):
        out.quantized.clear()
