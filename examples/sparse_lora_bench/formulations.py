"""The ways to train a low-rank update that are compared: models that share the weights of one pruned base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from peft_variator import SparseLoraConfig
from peft_variator.profiling import share_weights


__all__ = ["FORMULATIONS", "LORA", "PLAIN", "prune_at_random_", "target_names"]

LORA, PLAIN = "LoRA (PEFT)", "masked sum, plain autograd"


class PlainMaskedLinear(nn.Module):
    """y = x·((W + s·B·A) ⊙ M)ᵀ + b as the paper writes it, with torch's own autograd (arXiv 2404.02424)."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        self.a = nn.Parameter(weight.new_empty(rank, base_layer.in_features))
        self.b = nn.Parameter(weight.new_zeros(base_layer.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) -> (…, out); the scale s is 1, as lora_alpha = r."""
        weight = self.base_layer.weight
        return F.linear(x, (weight + self.b @ self.a) * (weight != 0), self.base_layer.bias)


def _lora(base: PreTrainedModel, rank: int) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def _sparse_lora(base: PreTrainedModel, rank: int, recompute: bool) -> nn.Module:
    return get_peft_model(base, SparseLoraConfig(r=rank, lora_alpha=rank, recompute=recompute))


def _plain_autograd(base: PreTrainedModel, rank: int) -> nn.Module:
    for name in target_names(base):
        base.set_submodule(name, PlainMaskedLinear(base.get_submodule(name), rank))
    return base


FORMULATIONS: dict[str, Callable[[PreTrainedModel, int], nn.Module]] = {
    LORA: _lora,
    "SparseLoRA, recompute": partial(_sparse_lora, recompute=True),
    "SparseLoRA, kept": partial(_sparse_lora, recompute=False),
    PLAIN: _plain_autograd,
}


def target_names(base: PreTrainedModel) -> list[str]:
    """The linear layers that all formulations adapt."""
    # not the configuration's `target_modules`, which PEFT shortens to suffixes for models with many layers
    return sorted(get_peft_model(share_weights(base), SparseLoraConfig()).targeted_module_names)


def prune_at_random_(base: PreTrainedModel, sparsity: float) -> int:
    """Zero this fraction of the weights that are adapted; gives their number. Speed depends on no values."""
    base.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Nothing is masked")  # not yet
        weights = [base.get_submodule(name).weight for name in target_names(base)]
    for weight in weights:
        weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) < sparsity, 0)
    return sum(weight.numel() for weight in weights)
