"""What becomes of every weight that a checkpoint stores, decided and checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import Checkpoint, CheckpointError
from .layout import is_two_four
from .names import KeyNames, matches
from .stored import StoredWeight, find_stored_weights


__all__ = ["Action", "PlannedWeight", "Rules", "check_size", "is_free_linear", "plan_weight", "plan_weights"]

Action = Literal["as_is", "packed", "dense"]
"""`as_is` loads the stored tensors into a `Sparse24Linear`, `packed` converts them for one, `dense` unpacks them."""


@dataclass(frozen=True)
class Rules:
    """Which layers are, or become, packed.

    Args:
        pack_dense: pack the dense weights that are 2:4. Otherwise a weight that `targets` means has to be packed.
        targets: the layers that have to be 2:4, see `names.matches`; None for those that happen to be.
        ignore: exceptions from `targets`, never packed from dense.
    """

    pack_dense: bool
    targets: tuple[str, ...] | None
    ignore: tuple[str, ...]

    def __post_init__(self) -> None:
        for pattern in (*(self.targets or ()), *self.ignore):
            if not pattern.startswith("re:"):
                continue
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error

    def requires(self, module: nn.Module, name: str) -> bool:
        """Whether the layer has to be 2:4."""
        return self.targets is not None and matches(module, name, self.targets) and not self.ignores(module, name)

    def ignores(self, module: nn.Module, name: str) -> bool:
        """Whether the layer stays as it is stored."""
        return matches(module, name, self.ignore)


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


def plan_weights(
    model: PreTrainedModel, checkpoint: Checkpoint, rules: Rules, dtype: torch.dtype
) -> list[PlannedWeight]:
    """Plan every weight of `checkpoint` that has to be packed, unpacked or rescaled; plain dense ones are left out.

    Args:
        model: dense model, on the meta device or not.
        checkpoint: its files.
        rules: which layers are packed.
        dtype: the model's dtype.

    Raises:
        CheckpointError: a weight is not 2:4 where it has to be, is damaged, or has another shape than the model's; the
            message names file, tensor and row. Or nothing is 2:4 at all.
    """
    names = KeyNames(model)
    weights = find_stored_weights(checkpoint.tensors).values()
    candidates = (plan_weight(model, names, stored, rules, dtype) for stored in weights)
    planned = [weight for weight in candidates if weight is not None]
    if rules.pack_dense and rules.targets is not None:
        _check_targets(model, names, weights, rules.targets)
    if all(weight.action == "dense" and weight.stored.layout == "dense" for weight in planned):
        raise CheckpointError(
            f"{', '.join(map(str, checkpoint.files))}: no linear layer of {type(model).__name__} is 2:4. Prune the "
            "model to 2:4 first, or load it without a Sparse24Config."
        )
    return planned


def _check_targets(
    model: PreTrainedModel, names: KeyNames, weights: Iterable[StoredWeight], targets: tuple[str, ...]
) -> None:
    parameters = {stored.module: names.parameter(stored.name) for stored in weights}
    layers = {name: model.get_submodule(found.rpartition(".")[0]) for name, found in parameters.items() if found}
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not any(matches(layers[name], name, targets) for name in linear):
        raise CheckpointError(
            f"targets={list(targets)} match no linear layer of {type(model).__name__}. A target is a layer's whole "
            f"name, such as {linear[:1]}, a class, such as 'Linear', or 're:' and a regular expression."
        )


def plan_weight(
    model: PreTrainedModel, names: KeyNames, stored: StoredWeight, rules: Rules, dtype: torch.dtype
) -> PlannedWeight | None:
    """Plan one weight; None if it stays plain and dense, or the model has no use for it. See `plan_weights`."""
    parameter = _find_parameter(stored, names)
    if parameter is None:
        return None
    module = model.get_submodule(parameter.rpartition(".")[0])
    action = _choose_action(stored, module, is_free_linear(model, module, parameter), rules)
    if action is None:
        return None
    check_size(stored, tuple(model.get_parameter_or_buffer(parameter).shape))
    stored.check()
    return PlannedWeight(stored, parameter, action, _dtype_of(model, parameter, dtype))


def _find_parameter(stored: StoredWeight, names: KeyNames) -> str | None:
    parameter = names.parameter(stored.name)
    if parameter is None and stored.layout != "dense" and names.targets(stored.name):
        raise CheckpointError(
            f"{stored.main}: the model keeps this weight fused with others, which can't be packed. Make the "
            "checkpoint dense with `peft-variator unpack` and load that."
        )
    return parameter


def _choose_action(stored: StoredWeight, module: nn.Module, free_linear: bool, rules: Rules) -> Action | None:
    if not free_linear:
        return None if stored.plain else "dense"
    if stored.layout == "sparse-24-bitmask":
        return "as_is" if stored.as_is else "packed"
    required = rules.requires(module, stored.module)
    if required and not rules.pack_dense and stored.layout == "dense":
        raise CheckpointError(f"{stored.main}: the weight is dense, but config.json says that it is packed.")
    may_pack = rules.pack_dense or stored.layout == "sparse-bitmask"
    if may_pack and not rules.ignores(module, stored.module) and (required or rules.targets is None):
        if _stores_two_four(stored):
            return "packed"
        if required:
            stored.read_packed(torch.float32)  # raises with the row
    return None if stored.plain else "dense"


def _stores_two_four(stored: StoredWeight) -> bool:
    return is_two_four(stored.main.read() if stored.plain else stored.read_dense(torch.float32))


def is_free_linear(model: PreTrainedModel, module: nn.Module, parameter: str) -> bool:
    """Whether a layer can be replaced: a plain nn.Linear whose weight no other module shares.

    Subclasses are left alone: their forward, or that of their parent, may read the weight.
    """
    tied: dict[str, str] = model.all_tied_weights_keys
    return type(module) is nn.Linear and parameter not in {*tied, *tied.values()} and parameter.endswith(".weight")


def check_size(stored: StoredWeight, expected: tuple[int, ...]) -> None:
    """Raise a CheckpointError unless the dense weight has the shape that the model expects."""
    if stored.size() != expected:
        raise CheckpointError(
            f"{stored.main}: it stores a weight of shape {stored.size()}, but the model of config.json has {expected}."
        )


def _dtype_of(model: PreTrainedModel, parameter: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, except for the parameters that the model keeps in float32."""
    kept: Iterable[tuple[str, torch.dtype]] = model._get_dtype_plan(dtype).items()
    return next((own for pattern, own in kept if re.search(pattern.replace("*", ".*"), parameter)), dtype)
