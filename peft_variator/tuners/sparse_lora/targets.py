"""What "all-linear" means: PEFT's own reading of it leaves out classes added with `register_layout`."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attaching import shorten
from .config import SparseLoraConfig
from .layer import SparseLoraLayer
from .layouts import find_layout


__all__ = ["all_linear", "refuse_hidden_targets"]

# PEFT trains these heads whole, and looks for targets before it says so.
_HEADS: dict[str, tuple[str, ...]] = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def all_linear(peft_config: SparseLoraConfig, model: nn.Module) -> set[str]:
    """Names of all linear layers of a model, in the layers that the configuration chooses.

    Raises:
        ValueError: there are none in these layers.
    """
    known_to_peft = _maybe_include_all_linear_layers(copy.copy(peft_config), model).target_modules
    names = set(known_to_peft or ()) | _registered_linears(model)
    heads = _HEADS.get(peft_config.task_type or "", ())
    return _in_chosen_layers(peft_config, {name for name in names if name.rpartition(".")[2] not in heads})


def refuse_hidden_targets(peft_config: SparseLoraConfig, model: nn.Module) -> None:
    """Raise if targets lie inside of a module that another method has wrapped: PEFT passes over them without a word.

    Raises:
        ValueError: there are some.
    """
    wrappers = [name for name, module in model.named_modules() if _is_of_another_method(module)]
    hidden = [
        name
        for name, module in model.named_modules()
        if any(name.startswith(f"{wrapper}.base_layer.") for wrapper in wrappers)
        and find_layout(module) is not None
        and _is_target(peft_config, name)
    ]
    if hidden:
        raise ValueError(
            f"{len(hidden)} target modules lie inside of modules that carry an adapter of another method, where PEFT "
            f"does not look for targets: {shorten(hidden)}. Add SparseLoRA first and the other adapter (a Variator "
            "plugin, say) after it, or name target_modules outside of them."
        )


def _is_of_another_method(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, SparseLoraLayer)


def _is_target(peft_config: SparseLoraConfig, key: str) -> bool:
    if peft_config.target_modules in (None, INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return True
    return bool(check_target_module_exists(peft_config, key.replace(".base_layer", "")))


def _registered_linears(model: nn.Module) -> set[str]:
    """Names of the linear layers of classes that PEFT does not know, outside of other adapters."""
    known = (nn.Linear, Conv1D, nn.Conv2d)
    return {
        name
        for name, module in model.named_modules()
        if find_layout(module) is not None and not isinstance(module, known) and not name.endswith(".base_layer")
    }


def _in_chosen_layers(peft_config: SparseLoraConfig, names: set[str]) -> set[str]:
    """The names in the layers of `layers_to_transform`, which PEFT does not look at for full names.

    Raises:
        ValueError: there are none.
    """
    if peft_config.layers_to_transform is None:
        return names
    by_suffix = copy.copy(peft_config)
    by_suffix.target_modules = {name.rpartition(".")[2] for name in names}
    chosen = {name for name in names if check_target_module_exists(by_suffix, name)}
    if not chosen:
        raise ValueError(
            f"layers_to_transform={peft_config.layers_to_transform!r}, layers_pattern={peft_config.layers_pattern!r}: "
            f"none of {shorten(sorted(names))} is in these layers. Indices count from 0 in the list that "
            "layers_pattern names."
        )
    return chosen
