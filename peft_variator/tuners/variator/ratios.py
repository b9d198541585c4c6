"""Changing the compression ratio of a plugin at run time."""

from __future__ import annotations

from torch import nn

from .layer import VariatorLayer


__all__ = ["set_compression_ratio"]


def set_compression_ratio(model: nn.Module, k: int, adapter_name: str | None = None) -> None:
    """Change the compression ratio k at run time, for every module of a plugin, those of `ratio_pattern` included.

    With `scoring="concat"` the ratio of the configuration gives every module the ratio that it was trained for. The
    saved configuration keeps the ratio that the plugin was made with.

    Args:
        model: a model with a Variator plugin, from `get_peft_model` or loaded with transformers' `load_adapter`.
        k: the ratio, from 1 (the exact base model) upwards.
        adapter_name: which plugin; `None`: the active one.

    Raises:
        ValueError: `k` is not a positive integer, the model has no such plugin, or the plugin's scores are tied to
            another ratio (`scoring="concat"`).
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"compression_ratio={k!r} has to be an integer of at least 1.")
    layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
    available = sorted({name for layer in layers for name in layer.rules})
    chosen = [(layer, name) for layer in layers for name in layer.rules if _is_chosen(layer, name, adapter_name)]
    if not chosen:
        missing = "active Variator plugin" if adapter_name is None else f"Variator plugin {adapter_name!r}"
        raise ValueError(f"The model has no {missing}. Its plugins are {available}.")
    ratios = [layer.ratio_for(name, k) for layer, name in chosen]  # all, before any layer is changed
    for (layer, name), ratio in zip(chosen, ratios, strict=True):
        layer.set_ratio(name, ratio)


def _is_chosen(layer: VariatorLayer, name: str, adapter_name: str | None) -> bool:
    return name == adapter_name if adapter_name is not None else name in layer.active_adapters
