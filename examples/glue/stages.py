"""The three stages: learn the task with LoRA, distil a plugin on plain text, adapt it to the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from problem import Problem
from torch import nn
from transformers import (
    AutoModel,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from variants import Variant

from peft_variator.training import DistillationConfig, DistillationTrainer, load_plugin


__all__ = ["adapt", "learn_task", "pretrain"]

BATCH_SIZE = 32


def learn_task(problem: Problem, base: str, tokenizer: PreTrainedTokenizerBase, seed: int, output: Path) -> None:
    """Fine-tune the base on a task with LoRA and save the merged model, which is the plugin's base and teacher.

    As in the paper, LoRA has r = 16 and sits on query and value.
    """
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["query", "value"], modules_to_save=list(problem.new_modules)
    )
    model = get_peft_model(problem.load(base), config)
    arguments = TrainingArguments(
        num_train_epochs=problem.epochs, learning_rate=1e-3, **_common(output / "runs", seed)
    )
    _trainer(Trainer, model, arguments, problem.train, tokenizer).train()
    model.merge_and_unload().save_pretrained(output)


def pretrain(
    variant: Variant,
    base: str,
    text: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    output: Path,
) -> None:
    """Stage one: distil a plugin on plain text and save it."""
    model = get_peft_model(AutoModel.from_pretrained(base, add_pooling_layer=False), variant.config(tokenizer))
    arguments = DistillationConfig(
        max_steps=steps,
        learning_rate=2e-3,
        hidden_loss=variant.hidden_loss,
        ratios=list(variant.ratios),
        **_common(output / "runs", seed=0),
    )
    _trainer(DistillationTrainer, model, arguments, text, tokenizer).train()
    model.save_pretrained(output)


def adapt(
    variant: Variant,
    problem: Problem,
    task_model: PreTrainedModel,
    plugin: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    output: Path,
) -> PeftModel:
    """Stage two: train the plugin on the task's texts and labels to follow the task model, and save it.

    Args:
        variant: how the plugin is made.
        problem: the task.
        task_model: the base that knows the task.
        plugin: folder of the plugin of stage one; `None` starts anew.
        tokenizer: tokenizer of the base.
        steps: optimizer steps.
        seed: seed of the run.
        output: folder of the adapted plugin.
    """
    if plugin is None:
        model = get_peft_model(task_model, variant.config(tokenizer))
    else:
        model = load_plugin(task_model, plugin)
    arguments = DistillationConfig(
        max_steps=steps,
        learning_rate=variant.learning_rate,
        hidden_loss=variant.hidden_loss,
        logits_weight=0.0 if task_model.config.num_labels == 1 else 1.0,
        task_weight=variant.task_weight,
        ratios=list(variant.ratios),
        **_common(output / "runs", seed),
    )
    _trainer(DistillationTrainer, model, arguments, problem.train, tokenizer).train()
    model.save_pretrained(output)
    return model


def _common(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH_SIZE,
        # Training computes in bfloat16 where the processor can; all scores are computed in float32.
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "group_by_length",
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }


def _trainer(
    trainer_type: type[Trainer],
    model: nn.Module,
    arguments: TrainingArguments,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:
    return trainer_type(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
