"""What a plugin learns from data before it is trained: which neurons it copies, and which tokens are outliers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...compat import in_process_group
from ...field_types import name_some, whole_number
from ...models import evaluating, on_device
from .decompression import NeuronsDecompression
from .forward_context import calls_of_any_size, selection_of
from .layer import VariatorLayer, plugin_layers
from .merging import Groups
from .network import Network
from .neurons import copy_neurons, has_left_its_start
from .outliers import LeastSquares, OutlierProbe
from .ratios import using_ratio


__all__ = [
    "Calibrated",
    "Observe",
    "calibrate",
    "check_outside_of_blocks",
    "checked_ratios",
    "copied_by",
    "device_of",
    "layers_to_calibrate",
    "needs_calibration",
    "nothing_merges",
    "observed",
    "rows_that_merge",
    "run_batches",
    "run_batches_at",
    "sum_over_processes",
]

Calibrated = tuple[VariatorLayer, str, Network]
"""A layer that copies neurons, the name of its active plugin, and its network."""
Observe = Callable[[VariatorLayer, Tensor, Groups, str], None]
"""What sees a layer's hidden states and groups; see `VariatorLayer.observer`."""

_ZEROS = ("variator_scorer", "variator_up", "variator_compensation_B")  # parts of a plugin that start as zeros


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]], ratios: Sequence[int] | None = None) -> None:
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
        ratios: compression ratios that the plugin is meant for, for layers that merge nothing at its own; `None`: of
            its schedule if it has one.

    Raises:
        ValueError: the model has no such plugin, its weights have left their start, or the batches have no tokens to
            merge; or the call stands inside of a `using_ratio` block. Nothing has been changed.
        TypeError: a batch is not a mapping, or has arrays of NumPy in place of tensors; or `ratios` is no sequence.
    """
    check_outside_of_blocks(model, "calibrate")
    rows = rows_that_merge(model, checked_ratios("calibrate", ratios))
    probes, layers = _probes_to_fit(model), layers_to_calibrate(model, rows, "calibrate")
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
            _choose_neurons(model, batches, layers, rows)
    except BaseException:
        for layer, weight in before.items():
            probes[layer].fit(weight)
        raise


def copied_by(layer: VariatorLayer, plugin: str) -> Tensor:
    """The numbers of the neurons that a plugin copies, shape `(r,)`."""
    return layer.modules_of(plugin)["variator_neurons"].get_buffer("index")


def nothing_merges(who: str) -> ValueError:
    """The error of a function, by its name, whose batches have no tokens that are merged."""
    return ValueError(
        f"{who}: the batches have no tokens that are merged. Pass longer texts, and more of them: at their ends as "
        "many are left alone as keep_first_tokens and keep_last_tokens say. A causal model merges none whose "
        "prediction has a label, so leave labels out where all have one."
    )


def _choose_neurons(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: list[Calibrated],
    rows: Sequence[int | None],
) -> None:
    spreads = {
        layer.name: torch.zeros(network.width, dtype=torch.float64, device=device_of(layer))
        for layer, _, network in layers
    }
    merged = {name: spread.new_zeros(()) for name, spread in spreads.items()}
    networks = {layer.name: network for layer, _, network in layers}

    def observe(layer: VariatorLayer, hidden_states: Tensor, groups: Groups, plugin: str) -> None:
        if layer.name in networks:
            merged[layer.name] += groups.is_merged.sum()
            spreads[layer.name] += _spread(layer, networks[layer.name], hidden_states, groups, plugin)

    run_batches_at(model, batches, rows, observe)
    sum_over_processes([*spreads.values(), *merged.values()])
    if not all(bool(count) for count in merged.values()):
        raise nothing_merges("calibrate")
    unknown = [name for name, spread in spreads.items() if not bool(spread.isfinite().all())]
    if unknown:
        warnings.warn(
            f"calibrate: the base model gives values that are not finite on these batches at {name_some(unknown)}, so "
            "which neurons to copy there stays as it is. Look for NaN in its weights, or run it in float32.",
            UserWarning,
            stacklevel=3,
        )
    for layer, plugin, network in layers:
        modules, spread = layer.modules_of(plugin), spreads[layer.name]
        if layer.name in unknown:
            continue
        width = copied_by(layer, plugin).numel()
        if bool(spread.any()):  # else the network writes nothing, and one choice is as good as another
            copy_neurons(modules, network, spread.topk(width).indices.sort().values)
        modules["variator_neurons"].is_calibrated = True  # type: ignore[assignment]  # a NeuronIndex


def _fit_probes(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], probes: dict[VariatorLayer, OutlierProbe]
) -> None:
    norms = _OutputNorms({layer: LeastSquares(layer.in_features, device_of(layer)) for layer in probes})
    with observed(model, probes, norms.observe, everywhere=True), norms.watched():
        run_batches(model, batches)
    sum_over_processes(each.sums for each in norms.fits.values())
    for layer, probe in probes.items():
        if not bool(norms.fits[layer].sums.isfinite().all()):
            raise ValueError(
                f"calibrate: the base model gives values that are not finite on these batches ({layer.name}), so no "
                "probe for keep_outliers can be fitted. Look for NaN in its weights, or run it in float32."
            )
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
def observed(
    model: nn.Module,
    layers: Iterable[VariatorLayer],
    observe: Observe,
    everywhere: bool = False,
) -> Iterator[None]:
    """Have the base model run with an observer at the layers of its plugin; see `VariatorLayer.observer`."""
    watched = list(layers)
    with evaluating(model), calls_of_any_size():
        try:
            for layer in watched:
                layer.observer, layer.observes_all = observe, everywhere
            with torch.no_grad():
                yield
        finally:
            for layer in watched:
                layer.observer, layer.observes_all = None, False


def run_batches(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Call the model once for each batch, on its device."""
    device = next(model.parameters()).device
    for batch in batches:
        model(**on_device(batch, device))


def run_batches_at(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], rows: Sequence[int | None], observe: Observe
) -> None:
    """Have an observer see the batches at each ratio, or row of a schedule; `None`: the one that is chosen."""
    batches = list(batches) if len(rows) > 1 else batches
    for row in rows:
        with observed(model, plugin_layers(model), observe), nullcontext() if row is None else using_ratio(model, row):
            run_batches(model, batches)


def sum_over_processes(sums: Iterable[Tensor]) -> None:
    """Add up what several processes have counted, in place; nothing happens where there is one."""
    if in_process_group():
        for each in sums:
            torch.distributed.all_reduce(each)


def needs_calibration(model: nn.Module, ratios: Sequence[int] | None = None) -> bool:
    """Whether the active plugin is new and copies neurons that were chosen without data, or lacks a probe.

    Args:
        model: the model.
        ratios: as for `calibrate`.
    """
    rows, found = rows_that_merge(model, ratios), False
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        if plugin is None:
            continue
        probe = layer.probe_of(plugin)
        if probe is not None and not probe.is_fitted:
            return True
        if layer.decompressions[plugin] != NeuronsDecompression.name or layer.configs[plugin].was_saved:
            continue
        network = layer.network()
        if network is None or not network.is_readable or not _merges_in(layer, plugin, rows):
            continue
        if _is_trained(model, layer, plugin):
            return False  # fitted or trained already, so that nothing is chosen any more
        found |= not layer.modules_of(plugin)["variator_neurons"].is_calibrated
    return found


def check_outside_of_blocks(model: nn.Module, who: str) -> None:
    """Refuse what would be learned of the plugin and the ratio of one block.

    Args:
        model: the model.
        who: name of the function that asks, for the error.

    Raises:
        ValueError: the call stands inside of a `using_ratio` block.
    """
    if any(selection_of(layer.ratios) is not None for layer in plugin_layers(model)):
        raise ValueError(
            f"{who} stands inside of a using_ratio block. Call it outside, with the plugin active (set_adapter) and "
            "its ratio chosen (set_compression_ratio, or ratios=[…])."
        )


def checked_ratios(who: str, ratios: Sequence[int] | None) -> list[int] | None:
    """Ratios to merge by, one at least; `None`: none are named.

    Raises:
        TypeError: they are no sequence.
        ValueError: there are none, or one of them merges nothing.
    """
    if ratios is None:
        return None
    if isinstance(ratios, str) or not isinstance(ratios, Iterable):
        raise TypeError(f"{who}: ratios={ratios!r} has to be a list of compression ratios, as in [2, 4, 8].")
    found = [whole_number(f"{who}: a ratio", ratio, 2) for ratio in ratios]
    if not found:
        raise ValueError(f"{who}: ratios={ratios!r} names none. Leave it out for the plugin's own.")
    return found


def rows_that_merge(model: nn.Module, ratios: Sequence[int] | None = None) -> list[int | None]:
    """Ratios, or rows of a schedule, at which together every layer merges that does so at any of them.

    The one that is chosen comes first, as `None`, and is mostly enough. For layers that it leaves alone others
    follow, those first at which most layers merge.

    Args:
        model: the model.
        ratios: those that may be added; `None`: the rows of the active plugin's schedule.
    """
    layers = [(layer, layer.active_plugin) for layer in plugin_layers(model)]
    merging: dict[int | None, set[str]] = {None: set()}
    for layer, plugin in layers:
        if plugin is None:
            continue
        for row in [None, *(layer.configs[plugin].ratio_schedule or () if ratios is None else ratios)]:
            if _merges_in(layer, plugin, [row]):
                merging.setdefault(row, set()).add(layer.name)
    covered = merging.pop(None)
    rows: list[int | None] = [None] if covered else []
    for row in sorted(merging, key=lambda row: (len(merging[row]), row), reverse=True):
        if not merging[row] <= covered:
            rows.append(row)
            covered |= merging[row]
    return rows or [None]


def _merges_in(layer: VariatorLayer, plugin: str, rows: Iterable[int | None]) -> bool:
    return any(layer.rule_at(plugin, row or layer.ratios.chosen.get(plugin)).ratio > 1 for row in rows)


def _probes_to_fit(model: nn.Module) -> dict[VariatorLayer, OutlierProbe]:
    found = {}
    for layer in plugin_layers(model):
        plugin = layer.active_plugin
        probe = None if plugin is None else layer.probe_of(plugin)
        if plugin is None or probe is None:
            continue
        if _is_trained(model, layer, plugin):
            raise _has_been_trained(layer, plugin, "calibrate")
        found[layer] = probe
    return found


def layers_to_calibrate(model: nn.Module, rows: Iterable[int | None], who: str) -> list[Calibrated]:
    """The layers whose active plugin copies neurons and merges.

    Args:
        model: the model.
        rows: of a schedule, or ratios, of which one that merges is enough; `None`: the ratio that is chosen.
        who: name of the function that asks, for errors.

    Raises:
        ValueError: the base model's neurons can't be read, or the plugin's weights have left their start.
    """
    rows, found = list(rows), []
    for layer in plugin_layers(model):
        plugin, network = layer.active_plugin, layer.network()
        if plugin is None or layer.decompressions[plugin] != NeuronsDecompression.name:
            continue
        if not _merges_in(layer, plugin, rows):
            continue
        if network is None or not network.is_readable:
            raise ValueError(f"{who}: the weights of {layer.name} cannot be read. Do this on the base as it was.")
        if _is_trained(model, layer, plugin):
            raise _has_been_trained(layer, plugin, who)
        found.append((layer, plugin, network))
    return found


def _is_trained(model: nn.Module, layer: VariatorLayer, plugin: str) -> bool:
    """Whether anything of a plugin, at a network or at the maps of its block, is no longer what it starts as."""
    network = layer.network()
    if layer.decompressions[plugin] == NeuronsDecompression.name and network is not None and network.is_readable:
        if has_left_its_start(layer.modules_of(plugin), network):
            return True
    maps = (module for module in model.modules() if getattr(module, "network_name", None) == layer.name)
    containers = (getattr(module, part, {}) for module in (layer, *maps) for part in _ZEROS)
    return any(bool(weight.any()) for each in containers if plugin in each for weight in each[plugin].parameters())


def _has_been_trained(layer: VariatorLayer, plugin: str, who: str) -> ValueError:
    return ValueError(
        f"{who}: the plugin {plugin!r} has been trained or fitted, and choosing or fitting its neurons or outliers "
        f"again would undo that ({layer.name}). Do this before the first step, or make a new plugin."
    )


def device_of(layer: VariatorLayer) -> torch.device:
    """Where a layer's weights are."""
    return next(layer.parameters()).device


def _spread(layer: VariatorLayer, network: Network, hidden_states: Tensor, groups: Groups, plugin: str) -> Tensor:
    """Sum over merged tokens of ‖v_j‖²·(a_j(x) − a_j(m))², shape `(width,)`."""
    rows = layer.compress(hidden_states, groups, plugin).flatten(0, -2)
    differences = network.neurons(hidden_states.flatten(0, -2)) - groups.spread(network.neurons(rows))
    squares = torch.where(groups.is_merged, differences.double().square(), 0).sum(0)
    return squares * network.out_columns(torch.arange(network.width)).double().square().sum(0)
