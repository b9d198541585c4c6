"""What a saved adapter changes in one model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..tuners.sparse_lora import SparseLoraLayer
from .checkpoint import CheckpointError, StoredTensor
from .saved_adapter import KEY_PREFIX, SavedAdapter
from .updates import LayerUpdate


__all__ = ["PlacedAdapter", "place_adapter"]

_NAMES_SHOWN = 3
_HEAD_HINT = (
    "If the adapter was made for the base with a new head, save the base once with that head, and merge into what was "
    "saved."
)


@dataclass(frozen=True)
class PlacedAdapter:
    """What an adapter changes in one model.

    Args:
        updates: name in the model of a weight -> the update for it.
        replaced: name in the model of another parameter (a bias, or one of `modules_to_save`) -> its new value.
    """

    updates: dict[str, LayerUpdate]
    replaced: dict[str, StoredTensor]


def place_adapter(saved: SavedAdapter, model: PreTrainedModel) -> PlacedAdapter:
    """Find the layer of every tensor. PEFT itself places the adapter, so that its reading of the config counts.

    Args:
        saved: the adapter.
        model: dense model on the meta device, which is changed.

    Raises:
        CheckpointError: the adapter does not fit the model; the message names the tensor.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        peft_model = PeftModel(model, copy.deepcopy(saved.config), low_cpu_mem_usage=True)
    except ValueError as error:
        raise CheckpointError(f"{saved.path} does not fit {type(model).__name__}: {error} {_HEAD_HINT}") from error
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    _check_expected(saved, type(model).__name__, {name.removeprefix(KEY_PREFIX): state[name] for name in state})
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLoraLayer)}
    updates = {f"{name}.weight": _update(saved, name, layer) for name, layer in layers.items()}
    taken = {part.name for update in updates.values() for part in update.parts}
    # with bias="all", PEFT saves the biases of these modules three times
    copies = {f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    copies = {prefix + part for prefix in copies for part in ("original_module.", "modules_to_save.")}
    others = {
        name: stored
        for name, stored in saved.tensors.items()
        if stored.name not in taken and not name.startswith(tuple(copies))
    }
    replaced = {_parameter(name, layers): stored for name, stored in others.items()}
    _check_replaced(saved, type(model).__name__, replaced, shapes)
    return PlacedAdapter(updates, replaced)


def _update(saved: SavedAdapter, name: str, layer: SparseLoraLayer) -> LayerUpdate:
    return LayerUpdate(
        module=name,
        layout=layer.layout,
        a=saved.tensors[f"{name}.sparse_low_rank_A"],
        b=saved.tensors[f"{name}.sparse_low_rank_B"],
        scale=layer.scaling["default"],
        mask=saved.tensors.get(f"{name}.sparse_low_rank_mask"),
        source=saved.tensors.get(f"{name}.sparse_low_rank_source"),
    )


def _check_expected(saved: SavedAdapter, model_name: str, expected: Mapping[str, Tensor]) -> None:
    """Check that every tensor is there which the config asks for, in its shape."""
    missing = [name for name in expected if name not in saved.tensors]
    if missing:
        raise CheckpointError(
            f"{saved.weights}: {_shorten(missing)} missing, which an adapter of this config has above {model_name}. "
            "The file is incomplete, or the adapter was made for another model."
        )
    for name, wanted in expected.items():
        found = saved.tensors[name]
        same_kind = found.dtype.is_floating_point if wanted.is_floating_point() else found.dtype == wanted.dtype
        if found.shape != tuple(wanted.shape) or not same_kind:
            raise CheckpointError(
                f"{found} is {found.dtype} {found.shape}, but above {model_name} it is {wanted.dtype} "
                f"{tuple(wanted.shape)}. The adapter was made for another model, or with another config."
            )


def _check_replaced(
    saved: SavedAdapter,
    model_name: str,
    replaced: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that every other tensor is a new value of a parameter of the model."""
    unknown = [stored.name for name, stored in replaced.items() if name not in shapes]
    if unknown:
        made_for = "" if saved.architecture is None else f", {saved.architecture}"
        raise CheckpointError(
            f"{saved.weights}: {_shorten(unknown)} has no place in {model_name}. The adapter was made for another "
            f"model{made_for}. {_HEAD_HINT}"
        )
    for name, stored in replaced.items():
        if stored.shape != shapes[name]:
            raise CheckpointError(
                f"{stored} has shape {stored.shape}, but {name} of {model_name} has {shapes[name]}. Save the base "
                "once with the vocabulary and labels of the adapter, and merge into what was saved."
            )


def _parameter(name: str, layers: Mapping[str, SparseLoraLayer]) -> str:
    """The parameter that a tensor of the file is a new value for: a bias is saved as that of the base layer."""
    module, _, part = name.rpartition(".base_layer.")
    return f"{module}.{part}" if module in layers else name


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" * (len(names) > _NAMES_SHOWN))
