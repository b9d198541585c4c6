"""The three stages: learn the task with LoRA, distil a plugin on plain text, adapt it to the task."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
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

from peft_variator import VariatorConfig
from peft_variator.training import DistillationConfig, DistillationTrainer, load_plugin


__all__ = ["VARIANTS", "Variant", "adapt", "learn_task", "plain_text", "pretrain"]

BATCH_SIZE = 32


@dataclass(frozen=True)
class Variant:
    """How a plugin is made.

    Args:
        ratios: compression ratios it is trained for and tested at.
        hidden_loss: which hidden states are compared.
        keeps_tokens: whether special tokens and both ends of a text stay out of the groups.
        fields: further fields of the plugin's configuration.
        is_pretrained: whether it has seen plain text before the task.
        task_weight: weight of the task's own loss in the adaptation, beside the teacher's hidden states and logits.
    """

    ratios: tuple[int, ...] = (2, 4, 8)
    hidden_loss: str = "all"
    keeps_tokens: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    is_pretrained: bool = True
    task_weight: float = 1.0

    @property
    def stage_one(self) -> Variant:
        """What decides how the plugin is distilled on plain text."""
        return replace(self, task_weight=0.0)

    def config(self, tokenizer: PreTrainedTokenizerBase) -> VariatorConfig:
        """The plugin's configuration."""
        fields = {"compression_ratio": self.ratios[0], **self.fields}
        if self.keeps_tokens:
            return VariatorConfig.from_tokenizer(tokenizer, **fields)
        return VariatorConfig(keep_first_tokens=0, keep_last_tokens=0, **fields)


VARIANTS: dict[str, Variant] = {
    "main": Variant(),
    "no-kept-tokens": Variant(keeps_tokens=False),
    "last-layer-loss": Variant(hidden_loss="last"),
    "no-pretraining": Variant(is_pretrained=False),
    "no-task-loss": Variant(task_weight=0.0),
    "one-ratio": Variant(ratios=(4,)),
    "one-ratio-concat": Variant(ratios=(4,), fields={"scoring": "concat"}),
}


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
        learning_rate=2e-3,
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


def plain_text(files: list[Path], tokenizer: PreTrainedTokenizerBase, max_length: int = 96) -> list[dict[str, Any]]:
    """Texts of one to four sentences from plain text files, tokenised.

    Args:
        files: text files in UTF-8.
        tokenizer: tokenizer of the base.
        max_length: number of tokens at most.
    """
    sentences = [
        sentence.strip()
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        for sentence in re.split(r"(?<=[.!?])\s+", line)
        if len(sentence.split()) > 3
    ]
    texts, start = [], 0
    while start < len(sentences):
        count = 1 + len(texts) % 4
        texts.append(" ".join(sentences[start : start + count]))
        start += count
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    return [{name: column[row] for name, column in encoded.items()} for row in range(len(texts))]
