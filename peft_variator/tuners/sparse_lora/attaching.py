"""The way masks reach an adapter that stores them, and what is said of modules without one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .layer import SparseLoraLayer


__all__ = ["attach_masks", "layers_of", "shorten", "warn_about_dense"]

_NAMES_SHOWN = 5


def attach_masks(model: nn.Module, masks: Mapping[str, torch.Tensor], adapter_name: str = "default") -> None:
    """Hand the masks of a pruned model to an adapter that was created with `mask="stored"`.

    They are saved with the adapter, one bit a weight, with a fingerprint of the base weight each one is for. Modules
    of the adapter without a mask keep every weight, about which one warning says so.

    Args:
        model: a `PeftModel`, a `SparseLoraModel`, or a transformers model after `add_adapter`.
        masks: name of the module in the base model -> bool mask of the shape of its weight, True where it is kept.
        adapter_name: the adapter.

    Raises:
        TypeError: a mask is not bool.
        ValueError: there is no such adapter; it stores no masks; a mask is for a module that it does not adapt, which
            would stay dense; or a mask has the wrong shape.
    """
    layers = layers_of(_base_model(model), adapter_name)
    if not layers:
        raise ValueError(f"The model has no SparseLoRA adapter named {adapter_name!r}. Add one, or name another.")
    unknown = sorted(masks.keys() - layers.keys())
    if unknown:
        raise ValueError(
            f"Adapter {adapter_name!r} does not adapt {len(unknown)} of the {len(masks)} masked modules, which would "
            f"stay dense: {shorten(unknown)}. Create it with SparseLoraConfig(target_modules=list(masks))."
        )
    for name, layer in layers.items():
        layer.attach_mask(adapter_name, masks.get(name))
    warn_about_dense(layers, adapter_name)


def _base_model(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, SparseLoraLayer]:
    """The layers that have this adapter, by the name their module has in the base model."""
    return {
        name.replace(".base_layer", ""): module  # inside the layer of another tuner
        for name, module in model.named_modules()
        if isinstance(module, SparseLoraLayer) and adapter_name in module.sparse_low_rank_A
    }


def warn_about_dense(layers: Mapping[str, SparseLoraLayer], adapter_name: str) -> None:
    """Say once for all modules of an adapter in which of them its mask masks nothing."""
    dense = [name for name, layer in layers.items() if layer.masks_nothing(adapter_name)]
    if dense:
        warnings.warn(
            f"Nothing is masked in {len(dense)} of the {len(layers)} modules of adapter {adapter_name!r}: none of "
            f"their weights is pruned, so they are fine-tuned as with plain LoRA: {shorten(dense)}.",
            stacklevel=2,
        )


def shorten(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
