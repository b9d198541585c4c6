"""What a plugin learns from data before it is trained: the neurons it copies, what they write, and outliers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...field_types import whole_number
from ...models import on_device
from .decompression import NeuronsDecompression
from .layer import VariatorLayer, plugin_layers
from .linear_maps import UpdatedRows
from .merging import Groups
from .network import Network
from .neurons import copy_neurons, has_left_its_start
from .outliers import LeastSquares, OutlierProbe
from .ratios import using_ratio


__all__ = ["calibrate", "fit_correction", "needs_calibration", "needs_fit"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""That `fit_correction` chooses from, as shares of the neurons' mean square."""
_MAX_SUMS = 1 << 27
"""Numbers that `fit_correction` sums at a time, 1 GiB; of more layers than these allow, the batches run again."""


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Find out by data which neurons the active plugin copies, and which tokens are outliers.

    For each network, S is the neurons with the largest E[‖v_j‖²·(a_j(x) − a_j(m))²] over the tokens x that share a row
    with others, m being the mean of their group, on the hidden states of the base model. The copies are then the base
    model's neurons again, so this comes before training. With `keep_outliers` a linear probe of each network is fitted
    first, by least squares, from a token's input to the logarithm of the norm of the network's output. Where several
    processes train, all of them call this, each with batches of its own.

    Args:
        model: a model whose active plugin has `decompression="neurons"` and a compression ratio above 1, or
            `keep_outliers`.
        batches: arguments of the model's call, by name; tensors are moved to the model's device.

    Raises:
        ValueError: the model has no such plugin, its weights have left their start, or the batches have no tokens to
            merge. Nothing has been changed.
        TypeError: a batch is not a mapping.
    """
    row = _widest_row(model)
    probes, layers = _probes_to_fit(model), _layers_to_calibrate(model, row, "calibrate")
    if not probes and not layers:
        raise ValueError(
            "calibrate: the model has no active Variator plugin with decompression='neurons' and a compression ratio "
            "above 1, or with keep_outliers. Nothing else is chosen by data."
        )
    before = {layer: probe.weight.clone() for layer, probe in probes.items()}
    try:
        if probes:
            batches = list(batches)  # neurons are chosen by groups without outliers
            _fit_probes(model, batches, probes)
        if layers:
            _choose_neurons(model, batches, layers, row)
    except BaseException:
        for layer, weight in before.items():
            probes[layer].fit(weight)
        raise


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
        ratios: compression ratios that are fitted together; `None`: the plugin's own.

    Raises:
        ValueError: the model has no such plugin, its weights have left their start, a ratio is none to merge by, or
            the batches have no tokens to merge. Nothing has been changed.
        TypeError: a batch is not a mapping.
    """
    row = _widest_row(model)
    layers = _layers_to_calibrate(model, row, "fit_correction")
    if not layers:
        raise ValueError(
            "fit_correction: the model has no active Variator plugin with decompression='neurons' and a compression "
            "ratio above 1. There is nothing to fit."
        )
    rows = [row] if ratios is None else [whole_number("fit_correction: a ratio", ratio, 2) for ratio in ratios]
    batches = list(batches)
    found = [changes for chunk in _in_chunks(layers) for changes in _fit_chunk(model, batches, chunk, rows)]
    for (layer, plugin, _), changes in zip(layers, found, strict=True):
        _set(layer.modules_of(plugin)["variator_neuron_out"], changes)


def needs_fit(model: nn.Module) -> bool:
    """Whether the active plugin is new and copies neurons that are still the base model's."""
    try:
        layers = _layers_to_calibrate(model, _widest_row(model), "fit_correction")
    except ValueError:
        return False
    return bool(layers) and not any(layer.configs[plugin].was_saved for layer, plugin, _ in layers)


_Calibrated = tuple[VariatorLayer, str, Network]


def _in_chunks(layers: list[_Calibrated]) -> Iterator[list[_Calibrated]]:
    """The layers, as many at a time as their sums have room."""
    chunk: list[_Calibrated] = []
    room = _MAX_SUMS
    for each in layers:
        layer, plugin, _ = each
        width = _copied(layer, plugin).numel()
        size = 2 * width * (width + layer.in_features)
        if chunk and size > room:
            yield chunk
            chunk, room = [], _MAX_SUMS
        chunk.append(each)
        room -= size
    yield chunk


def _copied(layer: VariatorLayer, plugin: str) -> Tensor:
    return layer.modules_of(plugin)["variator_neurons"].get_buffer("index")


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

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Count tokens: z, shape `(tokens, inputs)`, and e, shape `(tokens, outputs)`; the last quarter chooses."""
        cut = 3 * inputs.shape[0] // 4
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
    model: nn.Module, batches: Iterable[Mapping[str, Any]], layers: list[_Calibrated], rows: Sequence[int | None]
) -> list[dict[str, Tensor]]:
    """What each layer's last map becomes, by parameter; nothing where it stays as it is."""
    networks = {layer.name: network for layer, _, network in layers}
    moments = {
        layer.name: _Moments(_copied(layer, plugin).numel(), layer.in_features, _device_of(layer))
        for layer, plugin, _ in layers
    }

    def observe(layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        if layer.name in networks:
            moments[layer.name].add(*_regression(layer, networks[layer.name], hidden_states, groups, plugin))

    for row in rows:
        with (
            _observed(model, plugin_layers(model), observe),
            nullcontext() if row is None else using_ratio(model, row),
        ):
            _run(model, batches)
    _sum_over_processes(sums for each in moments.values() for sums in (each.squares, each.products))
    if not all(bool(each.squares.any()) for each in moments.values()):
        raise _nothing_merges("fit_correction")
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
    index = _copied(layer, plugin)
    rows = network.neurons(layer.compress(hidden_states, groups, plugin).flatten(0, -2))
    merged = groups.is_merged.squeeze(-1).nonzero().squeeze(-1)
    tokens = network.neurons(hidden_states.flatten(0, -2).index_select(0, merged))
    of_tokens = tokens[:, index].float()
    differences = of_tokens - groups.spread(rows[:, index])[merged].float()
    errors = network.out(tokens).float() - groups.spread(network.out(rows))[merged].float()
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


def _nothing_merges(who: str) -> ValueError:
    return ValueError(
        f"{who}: the batches have no tokens that are merged. Pass longer texts, and more of them; a causal model "
        "merges none whose prediction has a label, so leave labels out where all have one."
    )


def _choose_neurons(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: list[_Calibrated],
    row: int | None,
) -> None:
    spreads = {
        layer.name: torch.zeros(network.width, dtype=torch.float64, device=_device_of(layer))
        for layer, _, network in layers
    }
    networks = {layer.name: network for layer, _, network in layers}

    def observe(layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        if layer.name in networks:
            spreads[layer.name] += _spread(layer, networks[layer.name], hidden_states, groups, plugin)

    with _observed(model, plugin_layers(model), observe), nullcontext() if row is None else using_ratio(model, row):
        _run(model, batches)
    _sum_over_processes(spreads.values())
    if not all(bool(spread.any()) for spread in spreads.values()):
        raise _nothing_merges("calibrate")
    for layer, plugin, network in layers:
        modules = layer.modules_of(plugin)
        width = modules["variator_neurons"].get_buffer("index").numel()
        copy_neurons(modules, network, spreads[layer.name].topk(width).indices.sort().values)
        modules["variator_neurons"].is_calibrated = True  # type: ignore[assignment]  # a NeuronIndex


def _fit_probes(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], probes: dict[VariatorLayer, OutlierProbe]
) -> None:
    norms = _OutputNorms({layer: LeastSquares(layer.in_features, _device_of(layer)) for layer in probes})
    with _observed(model, probes, norms.observe, everywhere=True), norms.watched():
        _run(model, batches)
    _sum_over_processes(each.sums for each in norms.fits.values())
    for layer, probe in probes.items():
        weight = norms.fits[layer].solve()
        if weight is None:
            raise ValueError(
                f"calibrate: the batches have no tokens, or all with outputs of one norm, so no probe for "
                f"keep_outliers can be fitted ({layer.name}). Pass texts as the model is meant for."
            )
        probe.fit(weight)


class _OutputNorms:
    """What networks get and give, counted into what their probes are fitted from."""

    def __init__(self, fits: dict[VariatorLayer, LeastSquares]) -> None:
        self.fits = fits
        self._inputs: dict[VariatorLayer, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See what the networks give."""
        handles = [layer.end.register_forward_hook(partial(self._see_output, layer)) for layer in self.fits]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(self, layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        """See what a network gets; see `VariatorLayer.observer`."""
        real = groups.row_of < groups.num_rows
        self._inputs[layer] = hidden_states.flatten(0, -2)[real], real

    def _see_output(self, layer: VariatorLayer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if layer in self._inputs:
            inputs, real = self._inputs.pop(layer)
            output = output[0] if isinstance(output, tuple) else output  # of experts
            norms = output.flatten(0, -2)[real].double().norm(dim=-1)
            self.fits[layer].add(inputs, norms.clamp(min=1e-12).log())


@contextmanager
def _observed(
    model: nn.Module,
    layers: Iterable[VariatorLayer],
    observe: Callable[[VariatorLayer, Tensor, Groups, str], None],
    everywhere: bool = False,
) -> Iterator[None]:
    """Have the base model run with an observer at the layers of its plugin; see `VariatorLayer.observer`."""
    training, observed = model.training, list(layers)
    try:
        model.eval()
        for layer in observed:
            layer.observer, layer.observes_all = observe, everywhere
        with torch.no_grad():
            yield
    finally:
        for layer in observed:
            layer.observer, layer.observes_all = None, False
        model.train(training)


def _run(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    device = next(model.parameters()).device
    for batch in batches:
        model(**on_device(batch, device))


def _sum_over_processes(sums: Iterable[Tensor]) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for each in sums:
            torch.distributed.all_reduce(each)


def needs_calibration(model: nn.Module) -> bool:
    """Whether the active plugin is new and copies neurons that were chosen without data, or lacks a probe."""
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        if plugin is None:
            continue
        probe = layer.probe_of(plugin)
        if probe is not None and not probe.is_fitted:
            return True
        if layer.decompressions[plugin] != NeuronsDecompression.name:
            continue
        modules, network = layer.modules_of(plugin), layer.network()
        is_new = not layer.configs[plugin].was_saved and not modules["variator_neurons"].is_calibrated
        if not is_new or network is None or not network.is_readable or has_left_its_start(modules, network):
            continue
        if layer.rule_at(plugin, _widest_row(model) or layer.ratios.chosen.get(plugin)).ratio > 1:
            return True
    return False


def _widest_row(model: nn.Module) -> int | None:
    """The row of the active plugin's schedule that leaves least alone; `None`: it has none, and its ratio counts."""
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        schedule = None if plugin is None else layer.configs[plugin].ratio_schedule
        if schedule:
            return max(schedule)
    return None


def _probes_to_fit(model: nn.Module) -> dict[VariatorLayer, OutlierProbe]:
    found = {}
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        probe = None if plugin is None else layer.probe_of(plugin)
        if plugin is None or probe is None:
            continue
        up = layer.modules_of(plugin).get("variator_up")
        if up is not None and any(bool(parameter.any()) for parameter in up.parameters()):
            raise _has_been_trained(layer, plugin, "calibrate")
        found[layer] = probe
    return found


def _layers_to_calibrate(model: nn.Module, row: int | None, who: str) -> list[_Calibrated]:
    found = []
    for layer in plugin_layers(model):
        plugin, network = layer.active_plugin, layer.network()
        if plugin is None or layer.decompressions[plugin] != NeuronsDecompression.name:
            continue
        if layer.rule_at(plugin, row or layer.ratios.chosen.get(plugin)).ratio == 1:
            continue
        if network is None or not network.is_readable:
            raise ValueError(f"{who}: the weights of {layer.name} cannot be read. Do this on the base as it was.")
        if has_left_its_start(layer.modules_of(plugin), network):
            raise _has_been_trained(layer, plugin, who)
        found.append((layer, plugin, network))
    return found


def _has_been_trained(layer: VariatorLayer, plugin: str, who: str) -> ValueError:
    return ValueError(
        f"{who}: the plugin {plugin!r} has been trained or fitted, and choosing or fitting its neurons or outliers "
        f"again would undo that ({layer.name}). Do this before the first step, or make a new plugin."
    )


def _device_of(layer: VariatorLayer) -> torch.device:
    return next(layer.parameters()).device


def _spread(layer: VariatorLayer, network: Network, hidden_states: Tensor, groups: Groups, plugin: str) -> Tensor:
    """Sum over merged tokens of ‖v_j‖²·(a_j(x) − a_j(m))², shape `(width,)`."""
    rows = layer.compress(hidden_states, groups, plugin).flatten(0, -2)
    differences = network.neurons(hidden_states.flatten(0, -2)) - groups.spread(network.neurons(rows))
    squares = torch.where(groups.is_merged, differences.double().square(), 0).sum(0)
    return squares * network.out_columns(torch.arange(network.width)).double().square().sum(0)
