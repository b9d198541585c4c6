"""One way to train every variant: the same data, steps and learning rate, other adapters and losses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from peft_variator import SparseLoraConfig
from peft_variator.sparsity import measure_sparsity
from peft_variator.training import DistillationConfig, DistillationTrainer


__all__ = ["VARIANTS", "Variant", "adapt", "refill_zeros", "train"]

RANK = 8


@dataclass(frozen=True)
class Variant:
    """How a pruned model is restored.

    Args:
        masked: SparseLoRA; otherwise PEFT's LoRA.
        distilled: whether the dense model is followed: λ = 0.1 of the loss, as in He et al. 2024.
    """

    masked: bool
    distilled: bool

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the loss of a language model, (1 − λ)·task + λ·KL."""
        kl = 0.1 if self.distilled else 0.0
        return {"task_weight": 1.0 - kl, "logits_weight": kl, "hidden_weight": 0.0}


VARIANTS = {
    "lora": Variant(masked=False, distilled=False),
    "sparse-lora": Variant(masked=True, distilled=False),
    "sparse-lora-distilled": Variant(masked=True, distilled=True),
}


def adapt(pruned: PreTrainedModel, masked: bool, rank: int = RANK) -> PeftModel:
    """The pruned model with a fresh adapter on its pruned modules, scaled by 2."""
    targets = _pruned_modules(pruned)
    config = SparseLoraConfig if masked else LoraConfig
    return get_peft_model(pruned, config(r=rank, lora_alpha=2 * rank, target_modules=targets))


def train(
    model: PeftModel,
    weights: dict[str, float],
    teacher: nn.Module | None,
    rows: list[dict[str, Any]],
    collate: Callable[[list[Any]], Any],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    checkpoints: Path | None = None,
) -> None:
    """Train the adapter of `model` on `rows`; go on from the last one in `checkpoints`, if that is given."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = DistillationConfig(
            output_dir=str(checkpoints or scratch),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            # Training computes in bfloat16 where the processor can; all scores are computed in float32.
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="steps" if checkpoints else "no",
            save_steps=20,
            save_total_limit=2,
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **weights,
        )
        trainer = DistillationTrainer(
            model, arguments, teacher_model=teacher, train_dataset=rows, data_collator=collate
        )
        is_begun = checkpoints is not None and checkpoints.is_dir()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if is_begun else None)


@torch.no_grad()
def refill_zeros(model: nn.Module, pruned: nn.Module) -> None:
    """Put the zeros of `pruned` back into `model`, a merged copy of it."""
    originals = dict(pruned.named_modules())
    for name in _pruned_modules(pruned):
        model.get_submodule(name).weight.masked_fill_(originals[name].weight == 0, 0.0)


def _pruned_modules(model: nn.Module) -> list[str]:
    """Names of the modules with zeros, but for an output map that is tied to the embeddings: it is never pruned, has
    zeros only if rounding left some, and can't be merged into without changing the embeddings."""
    modules = dict(model.named_modules())
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    return [
        row.name
        for row in measure_sparsity(model).modules
        if row.sparsity > 0.01 and id(modules[row.name].weight) not in embeddings
    ]
