"""What `peft-variator restore` trains for, and how its losses on held-out data are measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..models import Task
from ..training import DistillationTrainer
from .train_data import Examples, TrainingData


__all__ = ["held_out_losses", "label_all", "loss_weights", "teacher_losses"]

# λ of He et al. 2024 (arXiv 2404.02424): the loss is (1 − λ)·task + λ·KL.
KL_WEIGHT = 0.1


def loss_weights(model: str, task: Task, kl_weight: float | None, has_teacher: bool) -> dict[str, float]:
    """Weights of the parts of the loss, fields of `DistillationConfig`.

    Args:
        model: the pruned model, named in messages.
        task: how it is used.
        kl_weight: λ; `None`: that of the paper if there is a teacher, else 0.
        has_teacher: whether there is a dense model to follow.

    Raises:
        ValueError: a loss has a weight and needs a teacher or predictions that are not there.
    """
    if task in ("causal", "seq2seq"):
        weight = (KL_WEIGHT if has_teacher else 0.0) if kl_weight is None else kl_weight
        if weight and not has_teacher:
            raise ValueError(f"--kl-weight is {weight}, but there is no dense model to follow. Name --teacher.")
        return {"task_weight": 1.0 - weight, "logits_weight": weight, "hidden_weight": 0.0}
    if kl_weight is not None:
        raise ValueError(f"--kl-weight needs predictions; {model} is used as {task}, and follows states.")
    if not has_teacher:
        raise ValueError(
            f"{model} is used as {task}: it has no loss of its own on plain data, and follows the hidden states of "
            "the dense model. Name that with --teacher."
        )
    return {"task_weight": 0.0, "logits_weight": 0.0, "hidden_weight": 1.0}


def label_all(data: TrainingData) -> TrainingData:
    """The data with every token predicted: nothing is merged here, so no part of a text is a mere prompt."""
    return replace(data, train=_all_labelled(data.train), held_out=_all_labelled(data.held_out))


def _all_labelled(rows: Examples) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = [rows[index] for index in range(len(rows))]
    return [{**example, "labels": example["input_ids"]} for example in examples]


def held_out_losses(trainer: DistillationTrainer) -> dict[str, float]:
    """The parts of the loss on the held-out data, by name, as means over predictions or tokens."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}_loss"] for name in trainer.terms}


@torch.no_grad()
def teacher_losses(trainer: DistillationTrainer, data: TrainingData) -> dict[str, float]:
    """The task loss of the dense model itself; it follows itself perfectly. Nothing where there is no such loss."""
    if "task" not in trainer.terms or trainer.teacher is None:
        return {}
    total = items = 0.0
    term, device = trainer.terms["task"], trainer.args.device
    for batch in data.held_out_batches(trainer.args.per_device_eval_batch_size, device):
        outputs = trainer.teacher.outputs(trainer.model, batch)
        sums = term.loss(outputs, outputs, batch)
        total += float(sums.errors.sum())
        items += float(sums.items.sum())
    return {"task": total / items}
