"""Tiny models from configs, pruned at random, and the method written down in the plainest way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.tiny_models import built_once, tiny_model


WEIGHTED = (nn.Linear, Conv1D, nn.Conv2d)
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass(frozen=True)
class Case:
    """A model, its inputs and what its adapter targets."""

    build: Callable[[], PreTrainedModel]
    inputs: dict[str, torch.Tensor]
    targets: dict[str, Any] = field(default_factory=dict)


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


CASES = {
    "bert": Case(lambda: tiny_model("bert-sequence", vocab_size=40, **SMALL), _tokens()),
    "gpt2": Case(lambda: tiny_model("gpt2", vocab_size=40, n_embd=16, n_head=2, n_inner=64), _tokens()),
    "llama": Case(lambda: tiny_model("llama", vocab_size=40, num_key_value_heads=1, **SMALL), _tokens()),
    "vit": Case(
        lambda: tiny_model("vit-classes", image_size=8, **SMALL),
        _pixels(),
        {"target_modules": ["projection", "q_proj", "v_proj", "fc1", "fc2", "query", "dense"]},
    ),
}


def prune_(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    """Zero random weights of every layer that SparseLoRA can adapt; some of them become -0.0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WEIGHTED):
                drop = torch.rand(module.weight.shape, generator=generator) < sparsity
                module.weight[drop] = torch.where(module.weight[drop] < 0, -0.0, 0.0)
    return model


@built_once
def build(name: str, pruned: bool = True) -> PreTrainedModel:
    """A fresh model of a case in eval mode, the same weights every time."""
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    return prune_(model) if pruned else model


def random_masks(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Random masks for the named modules, of the shape of their weights."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(model.get_submodule(name).weight.shape, generator=generator) < 0.5 for name in names}


def outputs(model: nn.Module, case: Case) -> torch.Tensor:
    """Logits of a case."""
    return model(**case.inputs).logits


def randomize_(model: nn.Module) -> nn.Module:
    """Give every adapter parameter a random value, so that updates are not zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sparse_low_rank_" in name or "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def plain_weight(
    weight: torch.Tensor, mask: torch.Tensor, updates: list[tuple[float, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """(W + Σ s·B·A) ⊙ M with torch's own autograd: the formula, term by term."""
    total = weight
    for scale, a, b in updates:
        total = total + scale * (b @ a)
    return total * mask.to(total.dtype)


def plain_model(model: nn.Module, updates: Callable[[str], torch.Tensor | None]) -> nn.Module:
    """A copy of a base model with the effective weight, from `updates(module name)`, in the place of each weight."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED) and (weight := updates(name)) is not None:
            module.weight = nn.Parameter(weight.detach().clone())
    return model
