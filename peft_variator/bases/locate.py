"""Where the layers that an adapter changes are in the files of its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .checkpoint import CheckpointError, StoredTensor
from .folder import ModelFolder
from .names import KeyNames
from .placed_adapter import place_adapter
from .saved_adapter import SavedAdapter
from .stored import StoredWeight, find_stored_weights
from .updates import LayerUpdate


__all__ = ["LocatedAdapter", "locate_adapter"]


@dataclass(frozen=True)
class LocatedAdapter:
    """A base's weights, and what an adapter does to them.

    Args:
        weights: all that are stored as weights of layers, and what else the adapter changes, by name in the base.
        updates: name in the base -> the update of the weight.
        replaced: name in the base -> the new value.
    """

    weights: dict[str, StoredWeight]
    updates: dict[str, LayerUpdate]
    replaced: dict[str, StoredTensor]


def locate_adapter(folder: ModelFolder, saved: SavedAdapter) -> LocatedAdapter:
    """Find every layer of an adapter in a base.

    Raises:
        CheckpointError: the base lacks one or has it in another shape, stores it together with others, or would have
            to be untied; the message names it.
    """
    model = folder.skeleton(saved.architecture)  # its names are those of the adapter; the base may have others
    names, tied = KeyNames(model), dict(model.all_tied_weights_keys)
    placed = place_adapter(saved, model)
    updates = _untie(placed.updates, tied)
    weights = find_stored_weights(folder.checkpoint.tensors)
    candidates = {**weights, **_other_tensors(folder, weights)}
    located = LocatedAdapter(weights, {}, {})
    shared = {*tied, *tied.values(), *updates}
    changed = {name: new for name, new in placed.replaced.items() if name not in shared}
    copies = {tied.get(name, name): new for name, new in placed.replaced.items() if name in shared}
    missing = {*updates, *changed, *copies}
    for name, weight in candidates.items():
        parameter = names.parameter(name)
        parameter = tied.get(parameter, parameter) if parameter is not None else None
        if parameter not in missing and parameter not in updates:
            continue
        missing.discard(parameter)
        if parameter in copies:
            _check_copy(copies[parameter], weight)
        if parameter in updates:
            located.updates[name], weights[name] = updates[parameter], weight
        elif parameter in changed:
            located.replaced[name], weights[name] = changed[parameter], weight
    _check_all_found(folder, saved, missing)
    _check_shapes(located)
    return located


def _check_copy(new: StoredTensor, weight: StoredWeight) -> None:
    """PEFT saves embeddings that are adapted, or tied to something that is, with the adapter: as they were."""
    if new.shape != weight.size() or not torch.equal(new.read(), weight.read_dense(new.dtype)):
        raise CheckpointError(
            f"{new}: it replaces {weight.main}, which shares its values with another parameter of the base or gets an "
            "update besides. If it was trained, save the base once with tie_word_embeddings=False, train above that, "
            "and merge into it; else the adapter was made for another base."
        )


def _other_tensors(folder: ModelFolder, weights: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Tensors that are no matrices of layers: biases, kernels of convolutions and so on."""
    taken = {part.name for weight in weights.values() for part in weight.parts.values()}
    tensors = folder.checkpoint.tensors
    return {name: StoredWeight(name, "dense", {"weight": tensors[name]}) for name in tensors if name not in taken}


def _untie(updates: Mapping[str, LayerUpdate], tied: Mapping[str, str]) -> dict[str, LayerUpdate]:
    """Updates by the name that stands for all parameters which share their values."""
    by_source: dict[str, LayerUpdate] = {}
    for name, update in updates.items():
        source = tied.get(name, name)
        if source in by_source:
            raise CheckpointError(
                f"{update.a}: {update.module} and {by_source[source].module} share one weight, and the adapter has an "
                "update for each. Merge in memory, with merge_and_unload()."
            )
        by_source[source] = update
    return by_source


def _check_all_found(folder: ModelFolder, saved: SavedAdapter, missing: Iterable[str]) -> None:
    for name in sorted(missing):
        raise CheckpointError(
            f"{folder.path} has no tensor for {name}, which the adapter in {saved.path} changes: it is missing, or "
            "stored together with others. If the model loads, load it with the adapter and merge in memory, with "
            "merge_and_unload()."
        )


def _check_shapes(located: LocatedAdapter) -> None:
    for name, update in located.updates.items():
        weight = located.weights[name]
        size, expected = weight.size(), (update.b.shape[0], update.a.shape[1])
        # only the shape is looked at
        if len(size) < 2 or update.layout.flatten(torch.empty(size, device="meta")).shape != expected:
            raise CheckpointError(
                f"{weight.main}: it stores a weight of shape {size}, but the adapter's {update.module} is {expected} "
                "as (out_features, in_features). Base and adapter belong to different models."
            )
    for name, new in located.replaced.items():
        weight = located.weights[name]
        if weight.size() != new.shape:
            raise CheckpointError(f"{weight.main}: it has shape {weight.size()}, but {new} has {new.shape}.")
