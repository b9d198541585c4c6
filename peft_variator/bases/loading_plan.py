"""What becomes of a checkpoint's weights in a model: whose they are, which are packed, and whether all are there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key
from transformers.pytorch_utils import Conv1D

from ..field_types import name_some
from ..model_files import CheckpointError
from ..models import is_pooler
from .checkpoint import Checkpoint
from .compressed_tensors import StoredWeight, find_stored_weights
from .config import Rules, names_layer
from .packing import is_two_four


__all__ = [
    "Action",
    "KeyNames",
    "PlannedWeight",
    "check_complete",
    "check_size",
    "check_sizes",
    "is_free_linear",
    "plan_weight",
    "plan_weights",
]

Action = Literal["keep", "pack", "unpack"]
"""`keep` loads the stored tensors into a `Sparse24Linear`, `pack` converts them for one, `unpack` makes them dense."""


class KeyNames:
    """How `from_pretrained` renames the keys of checkpoints for one model.

    Args:
        model: the model, possibly on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._targets = {
            pattern: entry.target_patterns for entry in self._converters for pattern in entry.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._renamed: dict[str, tuple[str, str | None]] = {}

    def renamed(self, key: str) -> str:
        """`key` before the prefix of the base model is added or removed."""
        return apply_renamings(key, self._renamings)

    def parameter(self, key: str) -> str | None:
        """The name in the model of the parameter that `key` is; None where there is none, or it is a part of one."""
        name, pattern = self._rename(key)
        return name if pattern is None and name in self._state else None

    def targets(self, key: str) -> list[str]:
        """The names in the model of all that is made of `key`; empty where the model has no use for it."""
        name, pattern = self._rename(key)
        first, *others = self._targets.get(pattern, [name]) if pattern else [name]
        return [
            target for target in (name, *(name.replace(first, other) for other in others)) if target in self._state
        ]

    def _rename(self, key: str) -> tuple[str, str | None]:
        if key not in self._renamed:
            renamed = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
            if renamed[0] not in self._state and key in self._state:
                # as transformers does: a key that is already right is not renamed
                renamed = rename_source_key(key, [], [], self._prefix, self._state)
            self._renamed[key] = renamed
        return self._renamed[key]


@dataclass(frozen=True)
class PlannedWeight:
    """One stored weight and what becomes of it.

    Args:
        stored: the weight.
        parameter: the name of the dense parameter in the model, for example `"model.layers.0.mlp.up_proj.weight"`.
        action: what becomes of it.
        dtype: dtype that it gets.
    """

    stored: StoredWeight
    parameter: str
    action: Action
    dtype: torch.dtype

    @property
    def module(self) -> str:
        """The name of the layer in the model."""
        return self.parameter.rpartition(".")[0]

    @property
    def becomes_packed(self) -> bool:
        """Whether the model has a packed layer for it."""
        return self.action != "unpack"


def plan_weights(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    rules: Rules,
    dtype: torch.dtype,
    *,
    bitmasks: bool = True,
    names: KeyNames | None = None,
) -> list[PlannedWeight]:
    """Plan every weight of `checkpoint` that has to be packed, unpacked or rescaled; plain dense ones are left out.

    Args:
        model: dense model, on the meta device or not.
        checkpoint: its files.
        rules: which layers are packed.
        dtype: the model's dtype.
        bitmasks: whether the bitmasks of weights that are kept as they are get checked here.
        names: of the model, where someone has made them.

    Raises:
        CheckpointError: a weight is not 2:4 where it has to be, is damaged, or has another shape than the model's; the
            message names file, tensor and row. Or nothing is 2:4 at all.
    """
    names = names or KeyNames(model)
    weights = find_stored_weights(checkpoint.tensors).values()
    candidates = (plan_weight(model, names, stored, rules, dtype, bitmasks=bitmasks) for stored in weights)
    planned = [weight for weight in candidates if weight is not None]
    if rules.pack_dense and rules.targets is not None:
        _check_targets(model, names, weights, rules.targets)
    if all(weight.action == "unpack" and not weight.stored.codec.sparse for weight in planned):
        raise _nothing_to_pack(model, checkpoint)
    return planned


def _nothing_to_pack(model: PreTrainedModel, checkpoint: Checkpoint) -> CheckpointError:
    """The error of a checkpoint without a weight to pack; pruning is advised where it would help."""
    files, name = ", ".join(map(str, checkpoint.files)), type(model).__name__
    transposed = [path for path, module in model.named_modules() if isinstance(module, Conv1D)]
    if not transposed:
        return CheckpointError(
            f"{files}: no linear layer of {name} is 2:4, so there is nothing to pack. Prune it to 2:4 first "
            "(peft-variator prune --pattern 2:4), or leave it dense."
        )
    can_be_packed = any(is_free_linear(model, module, f"{path}.weight") for path, module in model.named_modules())
    others = "no nn.Linear of it is 2:4" if can_be_packed else "it has no nn.Linear that can be"
    advice = ", or prune its nn.Linear layers to 2:4 first" if can_be_packed else ""
    return CheckpointError(
        f"{files}: {name_some(transposed)} of {name} are Conv1D layers of transformers, which are not packed, 2:4 or "
        f"not, and {others}, so there is nothing to pack. Leave it dense: load it with from_pretrained{advice}."
    )


def _check_targets(
    model: PreTrainedModel, names: KeyNames, weights: Iterable[StoredWeight], targets: tuple[str, ...]
) -> None:
    parameters = {stored.module: names.parameter(stored.name) for stored in weights}
    layers = {name: model.get_submodule(found.rpartition(".")[0]) for name, found in parameters.items() if found}
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not any(names_layer(layers[name], name, targets) for name in linear):
        raise CheckpointError(
            f"targets={list(targets)} match no linear layer of {type(model).__name__}. A target is a layer's whole "
            f"name, such as {linear[:1]}, a class, such as 'Linear', or 're:' and a regular expression."
        )


def plan_weight(
    model: PreTrainedModel,
    names: KeyNames,
    stored: StoredWeight,
    rules: Rules,
    dtype: torch.dtype,
    *,
    bitmasks: bool = True,
) -> PlannedWeight | None:
    """Plan one weight; None if it stays plain and dense, or the model has no use for it. See `plan_weights`."""
    parameter = _find_parameter(stored, names)
    if parameter is None:
        return None
    module = model.get_submodule(parameter.rpartition(".")[0])
    action = _choose_action(stored, module, is_free_linear(model, module, parameter), rules)
    if action is None:
        return None
    check_size(stored, model, parameter)
    if action == "keep" and not bitmasks:
        stored.check_sizes()
    else:
        stored.check()
    return PlannedWeight(stored, parameter, action, _dtype_of(model, parameter, dtype))


def _find_parameter(stored: StoredWeight, names: KeyNames) -> str | None:
    parameter = names.parameter(stored.name)
    if parameter is None and stored.codec.sparse and names.targets(stored.name):
        raise CheckpointError(
            f"{stored.main}: the model keeps this weight fused with others, which can't be packed. Make the "
            "checkpoint dense with `peft-variator unpack` and load that."
        )
    return parameter


def _choose_action(stored: StoredWeight, module: nn.Module, free_linear: bool, rules: Rules) -> Action | None:
    if not free_linear:
        return None if stored.plain else "unpack"
    if stored.codec.two_four:
        return "keep" if stored.matches_packed_layer else "pack"
    required = rules.requires(module, stored.module)
    if required and not rules.pack_dense and not stored.codec.sparse:
        raise CheckpointError(f"{stored.main}: the weight is dense, but config.json says that it is packed.")
    may_pack = rules.pack_dense or stored.codec.sparse
    if may_pack and not rules.ignores(module, stored.module) and (required or rules.targets is None):
        if is_two_four(stored.main.read() if stored.plain else stored.read_dense(torch.float32)):
            return "pack"
        if required:
            stored.read_packed(torch.float32)  # raises with the row
    return None if stored.plain else "unpack"


def is_free_linear(model: PreTrainedModel, module: nn.Module, parameter: str) -> bool:
    """Whether a layer can be replaced: a plain nn.Linear whose weight no other module shares.

    Subclasses are left alone: their forward, or that of their parent, may read the weight.
    """
    tied: dict[str, str] = model.all_tied_weights_keys
    return type(module) is nn.Linear and parameter not in {*tied, *tied.values()} and parameter.endswith(".weight")


def check_size(stored: StoredWeight, model: PreTrainedModel, parameter: str) -> None:
    """Raise a CheckpointError unless the dense weight has the shape that the model expects."""
    expected = tuple(model.get_parameter_or_buffer(parameter).shape)
    if stored.size() != expected:
        sizes = set(expected) - set(stored.size())
        fields = [f"{name}={value}" for name, value in model.config.to_dict().items() if type(value) is int]
        suspects = [field for field in fields if int(field.rpartition("=")[2]) in sizes]
        hint = f" ({', '.join(suspects)}, as it says, or for want of it)" if suspects else ""
        raise CheckpointError(
            f"{stored.main}: it stores a weight of shape {stored.size()}, but the model of config.json has "
            f"{expected}{hint}."
        )


def check_sizes(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError for the first weight of the files that has another shape in the model.

    Args:
        model: dense model, on the meta device or not.
        checkpoint: its files.
    """
    weights = find_stored_weights(checkpoint.tensors)
    decoded = [weight for weight in weights.values() if not weight.plain]
    names, parts = KeyNames(model), {part.name for weight in decoded for part in weight.parts.values()}
    dense = [StoredWeight.of_dense(stored) for name, stored in checkpoint.tensors.items() if name not in parts]
    for weight in (*decoded, *dense):
        parameter = names.parameter(weight.name)
        if parameter is not None:
            check_size(weight, model, parameter)


def _dtype_of(model: PreTrainedModel, parameter: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, except for the parameters that the model keeps in float32."""
    kept: Iterable[tuple[str, torch.dtype]] = model._get_dtype_plan(dtype).items()
    return next((own for pattern, own in kept if re.search(pattern.replace("*", ".*"), parameter)), dtype)


def check_complete(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    stored: Iterable[StoredWeight],
    *,
    pooler: bool = True,
    names: KeyNames | None = None,
) -> None:
    """Check that no parameter would be left without weights, or get numbers of another kind.

    A new head is no error: a layer may be missing where the checkpoint was saved from another class, if all of it is.

    Args:
        model: dense model.
        checkpoint: its files.
        stored: the weights that are not stored as plain dense tensors.
        pooler: whether a pooler has to be there.
        names: of the model, where someone has made them.

    Raises:
        CheckpointError: naming the parameters.
    """
    names = names or KeyNames(model)
    stored = list(stored)
    _check_kinds(model, checkpoint, names, stored)
    keys = {*checkpoint.tensors, *(weight.name for weight in stored)}
    loaded = {target for key in keys for target in names.targets(key)}
    missing = _missing(model, loaded)
    layers_with_weights = {name.rpartition(".")[0] for name in loaded}
    is_new_head = type(model).__name__ not in (model.config.architectures or ())
    missing = [
        name
        for name in missing
        if name.rpartition(".")[0] in layers_with_weights or not (is_new_head or (is_pooler(name) and not pooler))
    ]
    if missing:
        advice = " To leave out a pooler, pass add_pooling_layer=False." if all(map(is_pooler, missing)) else ""
        raise CheckpointError(
            f"{', '.join(map(str, checkpoint.files))}: {name_some(missing)} of {type(model).__name__} missing. The "
            "checkpoint is incomplete, or config.json describes a larger model; the parameters would be random."
            f"{advice}"
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
