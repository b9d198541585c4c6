"""Adapters with random weights, saved, and what merging them in memory gives."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_variator import attach_masks
from peft_variator.bases import Sparse24Linear


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def save_adapter(
    model: nn.Module, config: PeftConfig, folder: Path, masks: dict[str, Tensor] | None = None, seed: int = 0
) -> Path:
    """An adapter for `model`, which is left alone."""
    peft_model = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    if masks is not None:
        attach_masks(peft_model, masks)
    randomize(peft_model, seed)
    peft_model.save_pretrained(folder)
    return folder


def merged_in_memory(model: nn.Module, folder: Path) -> nn.Module:
    """PEFT's way: load the adapter and merge it."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model, packed ones unpacked."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Sparse24Linear):
            for part in ("compressed", "bitmask", "shape"):
                del state[f"{name}.{part}"]
            state[f"{name}.weight"] = module.unpack()
    return state
