"""Whether a checkpoint has every parameter of a model: what is missing would be random, with a mere warning."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedModel

from .checkpoint import Checkpoint, CheckpointError
from .names import KeyNames
from .stored import StoredWeight


__all__ = ["check_complete"]


def check_complete(model: PreTrainedModel, checkpoint: Checkpoint, stored: Iterable[StoredWeight]) -> None:
    """Check that no parameter would be left without weights, or get numbers of another kind.

    A new head is no error: a layer may be missing where the checkpoint was saved from another class, if all of it is.

    Args:
        model: dense model.
        checkpoint: its files.
        stored: the weights that are not stored as plain dense tensors.

    Raises:
        CheckpointError: naming the parameters.
    """
    names = KeyNames(model)
    stored = list(stored)
    _check_kinds(model, checkpoint, names, stored)
    keys = {*checkpoint.tensors, *(weight.name for weight in stored)}
    loaded = {target for key in keys for target in names.targets(key)}
    missing = _missing(model, loaded)
    if type(model).__name__ not in (model.config.architectures or ()):
        layers_with_weights = {name.rpartition(".")[0] for name in loaded}
        missing = [name for name in missing if name.rpartition(".")[0] in layers_with_weights]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CheckpointError(
            f"{', '.join(map(str, checkpoint.files))}: {shown} of {type(model).__name__} missing. The checkpoint is "
            "incomplete; the parameters would be random."
        )


def _missing(model: PreTrainedModel, loaded: set[str]) -> list[str]:
    """Parameters that are neither loaded, nor tied to one that is, nor declared optional by the model."""
    tied: dict[str, str] = model.all_tied_weights_keys
    sources = {tied.get(name, name) for name in loaded}
    optional = model._keys_to_ignore_on_load_missing or ()
    return [
        name
        for name, _ in model.named_parameters()
        if name not in loaded
        and tied.get(name, name) not in sources
        and not any(re.search(pattern, name) for pattern in optional)
    ]


def _check_kinds(
    model: PreTrainedModel, checkpoint: Checkpoint, names: KeyNames, weights: Iterable[StoredWeight]
) -> None:
    """transformers would load integers for a floating point parameter without a word."""
    decoded = {part.name for weight in weights for part in weight.parts.values()}
    for stored in checkpoint.tensors.values():
        parameter = None if stored.name in decoded else names.parameter(stored.name)
        if parameter is None or stored.dtype.is_floating_point:
            continue
        if model.get_parameter_or_buffer(parameter).is_floating_point():
            raise CheckpointError(f"{stored} has dtype {stored.dtype}, but {parameter} holds floating point numbers.")
