"""What a plugin has read of the base model's weights (`reads_base`), and when it reads them anew."""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ...compat import in_process_group
from ...offloading import is_offloading
from .decompression import NeuronsDecompression
from .linear_maps import RoundedRows
from .network import Network, Stamp, are_same, stamp, stamps_of
from .neurons import NeuronIndex, read_rows


if TYPE_CHECKING:  # which reads the base in every call
    from .layer import FeedForwardEnd, VariatorLayer


__all__ = ["Place", "Reading", "are_there", "note_read", "places_of", "read_base", "read_when_loaded"]

Place = tuple[nn.Module, str, nn.Module]
"""A module that holds another one, under which name, and that other one."""
WeakPlace = tuple[nn.Module, str, weakref.ref[nn.Module]]


class Reading(NamedTuple):
    """Where a plugin has read, and what was there."""

    places: list[WeakPlace]
    stamps: list[Stamp]


def places_of(layer: VariatorLayer, network: Network) -> list[Place]:
    """Where the maps of a layer's network are."""
    return [
        (holder, name, module)
        for root in layer.roots
        for holder in root.modules()
        for name, module in holder.named_children()
        if any(module is each for each in network.maps)
    ]


def are_there(places: list[Place]) -> bool:
    """Whether all modules are where they were."""
    return all(getattr(at, name) is module for at, name, module in places)


def read_base(layer: VariatorLayer, plugin: str, again: bool = False) -> None:
    """Read what a plugin takes of the base model's weights, where it or these have changed.

    Args:
        layer: the layer.
        plugin: name of the plugin.
        again: whether to read it whatever has changed.

    Raises:
        RuntimeError: it has changed and can't be read, or code is being compiled.
    """
    config = layer.configs[plugin]
    if not config.reads_base or layer.decompressions[plugin] != NeuronsDecompression.name:
        return
    if not again and layer.neurons_of(plugin).has_read() and not _was_written(layer, plugin):
        return
    network = None if torch.compiler.is_compiling() else layer.network()
    if network is None or not network.is_readable:
        raise RuntimeError(
            f"{layer.name}: the plugin {plugin!r} adds to rows of the base model's weights (correction_rank="
            f"{config.correction_rank}, correction_bits={config.correction_bits}), which have not been read yet "
            "and can't be read here. "
            "Load it onto a base that is in memory, and call the model once before it is compiled."
        )
    with torch.inference_mode(False), torch.no_grad():  # kept for calls that train, too
        read_rows(layer.modules_of(plugin), network)
    note_read(layer, plugin, network)
    maps = layer.modules_of(plugin).values()
    if not all(module.fits for module in maps if isinstance(module, RoundedRows)):
        warnings.warn(
            f"The plugin {plugin!r} was shrunk beside other weights than this base's: its copied neurons are "
            "differences from those, and what it gives here is off. Load it onto the base that it was made for; "
            "where a LoRA was merged into that since, and unloaded, shrink the whole plugin anew.",
            UserWarning,
            stacklevel=2,
        )


def note_read(layer: VariatorLayer, plugin: str, network: Network) -> None:
    """Note where a plugin has read, and what was there."""
    places = places_of(layer, network)
    weak = [(holder, name, weakref.ref(module)) for holder, name, module in places]
    layer.readings[plugin] = Reading(weak, _stamps(layer, plugin, [module for _, _, module in places]))


def _stamps(layer: VariatorLayer, plugin: str, maps: list[nn.Module]) -> list[Stamp]:
    """Of what a plugin reads of the base model, and of what it adds to that and sums once."""
    rounded = [module for module in layer.modules_of(plugin).values() if isinstance(module, RoundedRows)]
    own = [stamp(tensor) for module in rounded for tensor in (module.difference, module.scales)]
    return [each for module in maps for each in stamps_of(module)] + own


def _was_written(layer: VariatorLayer, plugin: str) -> bool:
    """Whether what was read has been written to or replaced since, other than by a loaded state, and can be read.

    Not looked at in code that is compiled, which is for the weights that there were, nor in processes of a group,
    where FSDP puts weights together for every call, as Accelerate brings those in that are offloaded.
    """
    if torch.compiler.is_compiling() or in_process_group():
        return False
    known = layer.readings.get(plugin)
    if known is not None:
        maps = [module for at, name, module in known.places if getattr(at, name) is module()]
        found = [each for each in (module() for _, _, module in known.places) if each is not None]
        if len(maps) == len(known.places) and are_same(_stamps(layer, plugin, found), known.stamps):
            return False
    around = [] if layer.around is None else [layer.around[0]]
    if any(map(is_offloading, (layer, layer.base_layer, *around))):
        return False
    network = layer.network()
    if network is None or not network.is_readable:
        return False  # offloaded, say: what was read stays
    if known is None:  # it was read when it was made
        note_read(layer, plugin, network)
        return False
    return True


def read_when_loaded(layer: VariatorLayer, end: FeedForwardEnd | None = None) -> None:
    """Have the base read anew after a state was loaded into a layer, or into the end of its network."""
    if end is None:
        layer.register_load_state_dict_post_hook(_read_again)
    else:
        end.register_load_state_dict_post_hook(partial(_read_again_behind, layer))


def _read_again(layer: VariatorLayer, incompatible_keys: Any) -> None:
    """After a state was loaded, which may have brought other neurons or another base."""
    for plugin in layer.rules:
        if not layer.has_end:
            read_base(layer, plugin, again=True)
        else:  # into which no state was loaded yet: it is read with that one, or in the next call
            neurons = layer.modules_of(plugin).get("variator_neurons")
            if isinstance(neurons, NeuronIndex):
                neurons.read_for = None
        probe = layer.probe_of(plugin)
        if probe is not None:
            probe.look_again()


def _read_again_behind(layer: VariatorLayer, end: nn.Module, incompatible_keys: Any) -> None:
    for plugin in layer.rules:
        read_base(layer, plugin, again=True)
