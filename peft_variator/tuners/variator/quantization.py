"""Plugins in few bits: quantised as their base is, to run, or shrunk, to be stored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import setitem
from typing import Any, TypeGuard, cast

import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.quantization.qconfig import (
    QConfig,
    float16_dynamic_qconfig,
    per_channel_dynamic_qconfig,
)

from .base_reading import read_base
from .compensation import CompensatedLinear
from .config import COMPENSATION_BITS, CORRECTION_BITS
from .layer import VariatorLayer
from .linear_maps import RoundedRows, RowsOfBase, SplitDynamicLinear, as_linear, is_quantized_map, is_torch_quantized
from .network import bias_of, unwrapped, weight_of
from .neurons import NeuronIndex, weights_of
from .ratios import layers_of


__all__ = [
    "count_parameters",
    "float_corrections",
    "float_state",
    "quantize_plugin",
    "quantized_parts",
    "shrink_plugin",
]

Quantize = Callable[[nn.Module], object]


def quantize_plugin(
    model: nn.Module,
    adapter_name: str | None = None,
    quantize: Quantize | None = None,
    *,
    sum_updates: bool = True,
    float_rows: bool = True,
) -> None:
    """Quantise a plugin's correction as its base is quantised, in place; call it last, when both are there.

    Quantised are the maps of the decompression, with `correction_rank` the sums of rows and update (with
    `correction_bits` those of rows and difference), and the maps with a low-rank update (`compensation_rank`), for
    which W + B·A is kept beside W. In floating point stay the scores, the updates themselves, and copies of neurons of
    maps that the base has in floating point: int8 in part, where a network's last map is left out because its inputs
    have outliers, leaves the plugin's out, too, which has the same inputs; a function that you name quantises it.
    Where torch's `quantize_dynamic` rounds what comes into a network, so it does merged rows, and what is done to one
    is done to k tokens: with `float_rows` the network's maps with an update run in floating point on them, few as they
    are. Of the copied neurons those that stand out in a call run so in any case; see [`SplitDynamicLinear`].
    What is quantised already, by a quantiser that ran over the whole model, stays as it is. Updates can be trained on,
    which drops their sums; other quantised maps can't. A plugin that is saved afterwards has the rounded weights in
    floating point, and loads onto any base.

    Args:
        model: a quantised model with a plugin.
        adapter_name: which plugin; `None`: the active one.
        quantize: quantises all `nn.Linear` in the module that it is given, in place, such as
            `lambda module: torchao.quantization.quantize_(module, config)`; `None`: as the base's own networks,
            int8 or float16 of torch's `quantize_dynamic`, or torchao's int8.
        sum_updates: whether W + B·A of a map with a low-rank update is quantised, too. `False`: the base's map and the
            update stay two; slower, and W is rounded once instead of twice.
        float_rows: whether W + B·A of a network's maps is kept in float32 where the base's is int8 and has an update:
            four bytes for each weight of the network. `False`: it is quantised as all others.

    Raises:
        ValueError: the model has no such plugin, or its base is not quantised, or in a way that needs `quantize`, or
            that function leaves a map as it is. Nothing has been changed.
        TypeError: `quantize` is no function.
    """
    if quantize is not None and not callable(quantize):
        raise TypeError(f"quantize={quantize!r} has to be a function that quantises a module in place, or None.")
    chosen = layers_of(model, adapter_name)
    names = {name for _, name in chosen}
    # Not where another method's adapter is on the map: that is no part of the sum.
    compensated = [
        module
        for module in model.modules()
        if isinstance(module, CompensatedLinear) and is_quantized_map(module.base_layer) and names & module.adapters()
    ]
    # A base may have its attention alone in int8, and networks that are known to be in floating point.
    in_part = bool(compensated) or (
        any(is_quantized_map(module) for module in model.modules())
        and all(layer.network() is not None for layer, _ in chosen)
    )
    # All maps are made before the first one is put into the model.
    changes: list[Callable[[], None]] = []
    for layer, name in chosen:
        if quantize is not None or _quantized_maps(layer) or not in_part:
            changes += _quantize_layer(layer, name, quantize)
    if sum_updates:
        rows = {id(each) for layer, _ in chosen for each in _maps_on_rows(layer)} if float_rows else set()
        for module in compensated:
            changes += _sum_updates(module, names, quantize, stays=id(unwrapped(module)) in rows)
    for change in changes:
        change()


@torch.no_grad()
def shrink_plugin(model: nn.Module, bits: int = 4, adapter_name: str | None = None) -> None:
    """Round the neurons that a trained plugin copies, and its compensation, in place, so that its file is small.

    What is kept of a copy is its difference from the base model's neuron in `bits` bits a number, and one scale for 64
    of them; see [`RoundedRows`]. The updates of `compensation_rank` have 8 bits; see [`RoundedFactor`]. The plugin is
    loaded onto the same base, whose rows are read again then. It runs as fast as before, and what is rounded is not
    trained on.

    Args:
        model: a model with a plugin with `decompression="neurons"`, whose copies are whole.
        bits: 4 or 8.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        ValueError: the model has no such plugin, or one without whole copies (a bottleneck, a low-rank update, one
            that was shrunk or quantised), or the base model's weights can't be read. Nothing has been changed.
    """
    if not isinstance(bits, int) or bits not in CORRECTION_BITS:
        raise ValueError(f"bits={bits!r} has to be 4 or 8.")
    chosen = layers_of(model, adapter_name)
    made = [part for layer, name in chosen for part in _round_copies(layer, name, bits)]
    if not made:
        raise ValueError("shrink_plugin: the plugin copies no neurons (decompression='neurons'), so none are rounded.")
    names = dict.fromkeys(name for _, name in chosen)
    compensated = [module for module in model.modules() if isinstance(module, CompensatedLinear)]
    factors = [
        (module, name, *each)
        for module in compensated
        for name in names.keys() & module.adapters()
        for each in module.rounded(name)
    ]
    for layer, part, name, module in made:
        getattr(layer, part)[name] = module
    for around, name, part, factor in factors:
        getattr(around, part)[name] = factor
        around.quantized.pop(name, None)
    for name in names:
        _set_config(model, [layer for layer, each in chosen if each == name], name, bits)
    for layer, name in chosen:
        read_base(layer, name, again=True)  # which notes what was read


def _set_config(model: nn.Module, layers: Sequence[VariatorLayer], name: str, bits: int) -> None:
    """Give a plugin a configuration of its own that says what was done: others may have been made from the same."""
    before = layers[0].configs[name]
    config = copy.copy(before)
    config.correction_bits = bits
    config.compensation_bits = None if config.compensation_rank is None else COMPENSATION_BITS
    for layer in layers:
        layer.configs[name] = config
    for module in model.modules():
        configs = vars(module).get("peft_config")
        if isinstance(configs, dict) and configs.get(name) is before:
            configs[name] = config


def _round_copies(layer: VariatorLayer, name: str, bits: int) -> Iterator[tuple[VariatorLayer, str, str, RoundedRows]]:
    """The rounded copies of a layer, with what they take the place of."""
    modules, network = layer.modules_of(name), layer.network()
    neurons = modules.get("variator_neurons")
    if not isinstance(neurons, NeuronIndex):
        return  # a bottleneck
    if network is None or not network.is_readable:
        raise ValueError(
            f"shrink_plugin: the base model's weights at {layer.name!r} cannot be read, as they are on disk or in a "
            "form that nothing turns back into numbers. Load the base in memory."
        )
    for part, (rows, _) in weights_of(network, neurons.index, merged=False).items():
        module = modules[part]
        if type(module) is not nn.Linear or is_quantized_map(module):
            raise ValueError(
                f"shrink_plugin: {layer.name!r} has a {type(module).__name__} where a plugin with whole copies in "
                "floating point has an nn.Linear: it has a correction_rank, or was shrunk or quantised before."
            )
        rounded = RoundedRows(module.in_features, module.out_features, bits, module.bias is not None)
        rounded.to(module.weight.device).to(module.weight.dtype).train(module.training)
        rounded.bias = module.bias
        rounded.set_weight(module.weight, rows)
        yield layer, part, name, rounded


def quantized_parts(model: nn.Module, adapter_name: str) -> list[str]:
    """Full names of a plugin's maps that are quantised, so that no floating-point weights can be loaded into them."""
    return [name for name, _ in _parts(model, adapter_name)]


def float_corrections(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """Names of a plugin's layers whose correction runs in floating point, though their network is quantised.

    Not those of copies of a map that the base has in floating point itself; see `quantize_plugin`.

    Args:
        model: a model with a plugin.
        adapter_name: which plugin; `None`: the active one.
    """
    return [layer.name for layer, name in layers_of(model, adapter_name) if _is_in_part(layer, name)]


def _is_in_part(layer: VariatorLayer, name: str) -> bool:
    """Whether some of a correction could be quantised as the network is, and is not."""
    left = _float_parts(layer)
    modules = layer.modules_of(name).items()
    return bool(_quantized_maps(layer)) and any(_is_float(module) for part, module in modules if part not in left)


def _is_float(module: nn.Module) -> bool:
    """Whether a map of a correction could be quantised and is not."""
    if isinstance(module, RowsOfBase):
        return not module.quantized
    return isinstance(module, nn.Linear) and not is_quantized_map(module)


def float_state(model: nn.Module, adapter_name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict with a plugin's quantised maps as `weight` and `bias` in floating point."""
    found = dict(state)
    for name, module in _parts(model, adapter_name):
        for key in [key for key in found if key.startswith(f"{name}.")]:
            del found[key]
        found[f"{name}.weight"] = weight_of(module).float()
        bias = bias_of(module)
        if bias is not None:
            found[f"{name}.bias"] = bias.float()
    return found


def _parts(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        if isinstance(layer, VariatorLayer) and adapter_name in layer.rules:
            for part, module in layer.modules_of(adapter_name).items():
                if is_quantized_map(module):
                    yield f"{name}.{part}.{adapter_name}" if name else f"{part}.{adapter_name}", module


def _quantize_layer(
    layer: VariatorLayer, adapter_name: str, quantize: Quantize | None
) -> Iterator[Callable[[], None]]:
    """What puts the quantised maps of a layer's plugin in their places; `quantize` as of `quantize_plugin`."""
    way = quantize or _way_of(layer)
    left = () if quantize is not None else _float_parts(layer)
    read_base(layer, adapter_name)
    module: Any
    for part, module in layer.modules_of(adapter_name).items():
        if part in left:
            continue
        is_float = isinstance(module, RowsOfBase) or (isinstance(module, nn.Linear) and not is_quantized_map(module))
        made = _quantized(as_linear(module.weight, module.bias), way) if is_float else module
        is_split = isinstance(made, SplitDynamicLinear)
        # Also one that was quantised before, which a quantiser does that runs over the whole model.
        if part == "variator_neuron_out" and quantize is None and not is_split and _rounds_activations(made):
            made = SplitDynamicLinear.of(made, module.weight if is_float else weight_of(made).float())
        if isinstance(module, RowsOfBase):
            yield partial(setitem, module.quantized, "rows", made)
        elif made is not module:
            yield partial(setitem, getattr(layer, part), adapter_name, made)


def _sum_updates(
    module: CompensatedLinear, names: set[str], quantize: Quantize | None, *, stays: bool
) -> Iterator[Callable[[], None]]:
    """What puts W + B·A of some plugins beside a map's W, quantised unless it stays in floating point."""
    way = quantize or _like(module.base_layer)
    for name in names & module.adapters() if way is not None else ():
        summed = module.summed(name) if stays else _quantized(module.summed(name), cast(Quantize, way))
        yield partial(setitem, module.quantized, name, summed)


def _maps_on_rows(layer: VariatorLayer) -> list[nn.Module]:
    """The maps of a layer's network whose activations the base rounds: what runs on merged rows while they merge."""
    network = layer.network()
    return [] if network is None else [each for each in map(unwrapped, network.maps) if _rounds_activations(each)]


def _quantized(linear: nn.Linear, way: Quantize) -> nn.Module:
    """A map as `way` quantises it: in a container, since some put another module in its place."""
    holder = nn.Sequential(linear.requires_grad_(False).eval())
    way(holder)
    if not is_quantized_map(holder[0]):
        raise ValueError(
            f"quantize={way!r} has left a map of {linear} as it was; it has to quantise nn.Linear layers."
        )
    return holder[0]


def _rounds_activations(module: object) -> TypeGuard[DynamicLinear]:
    """Whether a map is int8 of torch's `quantize_dynamic`, which rounds what comes in, rather than its float16."""
    return isinstance(module, DynamicLinear) and weight_of(module, dequantize=False).is_quantized


def _way_of(layer: VariatorLayer) -> Quantize:
    quantized = _quantized_maps(layer)
    if not quantized:
        raise ValueError(
            f"The base network of {layer.name!r} is not quantised, or its inside is not known, so there is nothing to "
            "quantise the plugin like. Quantise the base first, or name `quantize=`, a function that quantises the "
            "nn.Linear layers of a module. The plugin of a packed 2:4 base stays dense."
        )
    way = _like(quantized[0])
    if way is None:
        raise ValueError(
            f"{layer.name!r} is quantised with {type(quantized[0].weight).__name__} weights; a plugin is quantised "
            "alike by itself for torch's quantize_dynamic and torchao's int8 only. Name `quantize=`, a function that "
            "quantises the nn.Linear layers of a module, or leave the plugin in floating point, where it works too."
        )
    return way


def _float_parts(layer: VariatorLayer) -> list[str]:
    """The maps of copied neurons whose like in a network that is quantised in part is in floating point."""
    network = layer.network()
    if network is None:
        return []
    likes = {
        "variator_neuron_into": network.into,
        "variator_neuron_gate": network.into if network.gate is None else network.gate,
        "variator_neuron_out": network.out,
    }
    return [part for part, module in likes.items() if not is_quantized_map(unwrapped(module))]


def _quantized_maps(layer: VariatorLayer) -> list[Any]:
    """The quantised ones of a layer's network, of its first and its last map."""
    network = layer.network()
    maps = () if network is None else (network.into, network.out)
    return [module for module in map(unwrapped, maps) if is_quantized_map(module)]


def _like(module: Any) -> Quantize | None:
    """What quantises other maps as this one is; `None`: there is nothing that would."""
    if is_torch_quantized(module):
        return _quantize_like(module) if isinstance(module, DynamicLinear) else None
    weight = module.weight
    if not hasattr(weight, "act_quant_kwargs") or getattr(weight, "qdata", weight).dtype != torch.int8:
        return None  # torchao's Int8Tensor has both

    def quantize(holder: nn.Module) -> None:
        from torchao.quantization import (  # type: ignore[import-not-found]  # an extra
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        dynamic = weight.act_quant_kwargs is not None
        quantize_(holder, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())

    return quantize


def _quantize_like(module: DynamicLinear) -> Quantize:
    weight = weight_of(module, dequantize=False)
    # A scale for each output whatever the base has: W + B·A is rounded a second time, and it costs nothing more.
    config: QConfig = per_channel_dynamic_qconfig if weight.is_quantized else float16_dynamic_qconfig

    def quantize(holder: nn.Module) -> None:
        for name, linear in list(holder.named_children()):
            vars(linear)["qconfig"] = config
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*reduce_range.*")  # the observer's default
                setattr(holder, name, DynamicLinear.from_float(linear))

    return quantize


def count_parameters(tensors: Iterable[tuple[str, int, bool]], bits: int | None) -> int:
    """Number of parameters of an adapter; of one that was shrunk with what fills up blocks.

    Args:
        tensors: of each of its tensors, as they are saved, the name, how many numbers it holds, and whether they are
            in floating point; integers say which neurons were copied, unless it was shrunk.
        bits: `correction_bits` of its configuration; 4 and 8 are those of an adapter that was shrunk.
    """
    if bits not in CORRECTION_BITS:
        return sum(count for _, count, is_floating in tensors if is_floating)
    total = 0
    for name, count, is_floating in tensors:
        if name.endswith(".difference"):
            total += count * 8 // bits
        elif name.endswith(".numbers") or (is_floating and not name.endswith((".scales", ".fingerprint"))):
            total += count
    return total
