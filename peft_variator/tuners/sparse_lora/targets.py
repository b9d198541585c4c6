"""What "all-linear" means: PEFT's own reading of it leaves out classes added with `register_layout`."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attaching import shorten
from .config import SparseLoraConfig
from .layouts import find_layout


__all__ = ["all_linear"]


def all_linear(peft_config: SparseLoraConfig, model: nn.Module) -> set[str]:
    """Names of all linear layers of a model, in the layers that the configuration chooses.

    Raises:
        ValueError: there are none in these layers.
    """
    known_to_peft = _maybe_include_all_linear_layers(copy.copy(peft_config), model).target_modules
    return _in_chosen_layers(peft_config, set(known_to_peft or ()) | _registered_linears(model))


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
