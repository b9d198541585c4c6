"""`peft-variator restore`: a pruned model and text in, a SparseLoRA adapter with its model card out."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, PeftType, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from ..models import Task
from ..profiling import find_task, load_config
from ..sentence_folder import sentence_files
from ..sparsity import measure_sparsity
from ..training import DistillationTrainer, load_plugin
from ..training.model_card import RestoredFacts, restored_card
from ..tuners.sparse_lora import SparseLoraConfig, SparseLoraLayer
from .console import Reporter, next_commands
from .examples import Examples, TrainingData
from .training_run import (
    RunSettings,
    check_checkpoints,
    load_run_data,
    load_weights,
    show_only_a_bar,
    tell_of_run,
    train_or_resume,
    training_arguments,
    write_adapter,
)


__all__ = ["RestoreJob", "restore"]

# λ of He et al. 2024 (arXiv 2404.02424): the loss is (1 − λ)·task + λ·KL.
KL_WEIGHT = 0.1
DEFAULT_RANK, DEFAULT_ALPHA = 8, 16.0
# A dense weight can hold a zero by chance; a pruned one holds far more.
LEAST_SPARSITY = 0.01


@dataclass
class RestoreJob(RunSettings):
    """Settings of a run that restores a pruned model; each is an option of the command.

    Raises:
        ValueError: a setting is out of range, or the model has no pretrained weights.
        FileExistsError: the output folder exists and is not empty.
    """

    subcommand: ClassVar[str] = "restore"

    lr: float = 1e-3
    teacher: str | None = None
    kl_weight: float | None = None
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight is not None and not 0 <= self.kl_weight <= 1:
            raise ValueError(f"--kl-weight is {self.kl_weight}; it is the λ of (1 − λ)·task + λ·KL, from 0 to 1.")
        if self.adapter is not None and not (self.rank is None and self.alpha is None):
            raise ValueError(
                "--rank and --alpha are of a new adapter; that of --adapter keeps its own. Leave them out."
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ValueError(
                "restore measures the model before it trains it, and FSDP shards a model only when it trains. Start "
                "it with `accelerate launch --multi_gpu` or `torchrun`, or train in Python with DistillationTrainer."
            )

    def run(self, reporter: Reporter) -> tuple[RestoredFacts, bool]:
        """Train an adapter and write it with its card.

        Returns:
            tuple[RestoredFacts, bool]: what is known about it, and whether this is the process that wrote it.
        """
        check_checkpoints(self)
        beside = sentence_files(self.model)
        config = load_config(self.model)
        task = self.task or find_task(self.model, config)
        self._check_teacher(config)
        # The adapter decides whether there is a teacher, and so which losses there are: before the data is read.
        set_seed(self.seed)
        model = self._adapter(load_weights(self.model, task))
        has_teacher = self._follows_its_base(model) or self.teacher is not None
        weights = _loss_weights(self.model, task, self.kl_weight, has_teacher)
        teacher = None if self.teacher is None else load_weights(self.teacher, task)
        data = load_run_data(self, task, reporter)
        if task == "causal":
            # Nothing is merged here, so no part of a text is a mere prompt.
            data = replace(data, train=_all_labelled(data.train), held_out=_all_labelled(data.held_out))
        with training_arguments(self, task, prediction_loss_only=True, **weights) as args:
            trainer = DistillationTrainer(
                model,
                args,
                teacher_model=teacher,
                train_dataset=data.train,
                eval_dataset=data.held_out,
                data_collator=data.collate,
            )
            show_only_a_bar(trainer)
            losses = {"dense": _teacher_losses(trainer, data), "pruned": _held_out_losses(trainer)}
            train_or_resume(trainer, self, reporter)
            losses["restored"] = _held_out_losses(trainer)
            facts = self._facts(model, data, weights, losses)
            return facts, write_adapter(self, model, trainer, facts, restored_card, beside)

    def _check_teacher(self, pruned: PreTrainedConfig) -> None:
        """Raise if the teacher can't be the dense model that was pruned."""
        if self.teacher is None:
            return
        pruned, dense = pruned.get_text_config(), load_config(self.teacher).get_text_config()
        for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
            ours, theirs = getattr(pruned, name, None), getattr(dense, name, None)
            if ours != theirs:
                raise ValueError(
                    f"--teacher {self.teacher} is not what {self.model} was pruned from: {name} is {theirs!r} there, "
                    f"and {ours!r} here. Name the dense model."
                )

    def _adapter(self, base: PreTrainedModel) -> PeftModel:
        """The base with the adapter to train: the one that was named, or one on the modules that are pruned."""
        if self.adapter is not None:
            model = load_plugin(base, self.adapter)
            if not isinstance(model.peft_config["default"], SparseLoraConfig):
                kind = PeftType(model.peft_config["default"].peft_type).value
                raise ValueError(f"--adapter {self.adapter} has the method {kind}, not SparseLoRA.")
            if self.teacher is not None and self._follows_its_base(model):
                raise ValueError(
                    "The adapter stores its masks, so its dense base is the teacher. Leave --teacher out."
                )
            return model
        pruned = [row.name for row in measure_sparsity(base).modules if row.sparsity >= LEAST_SPARSITY]
        if not pruned:
            raise ValueError(
                f"No linear layer of {self.model} is pruned, so there is nothing to restore. Prune it first: "
                "peft-variator prune MODEL --pattern 2:4 --data FILE --output DIR. If its masks are stored in an "
                "adapter, name that with --adapter."
            )
        rank = DEFAULT_RANK if self.rank is None else self.rank
        alpha = DEFAULT_ALPHA if self.alpha is None else self.alpha
        return get_peft_model(base, SparseLoraConfig(r=rank, lora_alpha=alpha, target_modules=set(pruned)))

    @staticmethod
    def _follows_its_base(model: PeftModel) -> bool:
        """Whether the base is still dense, since the adapter holds the masks, and so is its own teacher."""
        return model.peft_config["default"].mask == "stored"

    def _facts(
        self, model: PeftModel, data: TrainingData, weights: dict[str, float], losses: dict[str, dict[str, float]]
    ) -> RestoredFacts:
        layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
        masks = [layer.get_mask("default") for layer in layers]
        return RestoredFacts(
            base=self.model,
            model_class=type(model.get_base_model()).__name__,
            name=self.push_to_hub or str(self.output),
            data=", ".join(self.data),
            teacher=self.model if self._follows_its_base(model) else self.teacher,
            weights=weights,
            steps=self.steps,
            held_out=len(data.held_out),
            parameters=sum(value.numel() for value in model.parameters() if value.requires_grad),
            modules=len(layers),
            masked=1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks),
            command=self.command,
            losses=losses,
        )


def _loss_weights(model: str, task: Task, kl_weight: float | None, has_teacher: bool) -> dict[str, float]:
    """Weights of the parts of the loss; without λ it is the paper's where there is a teacher, else 0."""
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


def _all_labelled(rows: Examples) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = [rows[index] for index in range(len(rows))]
    return [{**example, "labels": example["input_ids"]} for example in examples]


def _held_out_losses(trainer: DistillationTrainer) -> dict[str, float]:
    """The parts of the loss on the held-out data, by name, as means over predictions or tokens."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}_loss"] for name in trainer.terms}


@torch.no_grad()
def _teacher_losses(trainer: DistillationTrainer, data: TrainingData) -> dict[str, float]:
    """The task loss of the dense model itself; it follows itself perfectly. Nothing where there is no such loss."""
    if "task" not in trainer.terms or trainer.teacher is None:
        return {}
    total = items = 0.0
    term, device = trainer.terms["task"], trainer.args.device
    trainer.model.eval()
    for batch in data.held_out_batches(trainer.args.per_device_eval_batch_size, device):
        outputs = trainer.teacher.outputs(trainer.model, batch)
        sums = term.loss(outputs, outputs, batch)
        total += float(sums.errors.sum())
        items += float(sums.items.sum())
    return {"task": total / items}


def restore(job: RestoreJob, reporter: Reporter) -> None:
    """Restore a pruned model and tell what came of it."""
    reporter.check()
    facts, is_first = job.run(reporter)
    if is_first:
        tell_of_run(job, facts, _show, reporter)


def _show(job: RestoreJob, facts: RestoredFacts, reporter: Reporter) -> None:
    lines = [
        f"Adapted {facts.modules} modules, {facts.masked:.2%} of whose weights are masked, "
        + ("following no dense model." if facts.teacher is None else f"following the dense model {facts.teacher}."),
        f"Wrote {job.output}: the adapter ({facts.parameters:,} parameters), its model card README.md, and "
        "training.json with the losses.",
        *_next_steps(job, facts),
    ]
    reporter.show_figures(f"{facts.base} on {facts.held_out} held-out examples", facts.rows(), lines)


def _next_steps(job: RestoreJob, facts: RestoredFacts) -> list[str]:
    """How to merge it, which keeps every zero: the command, which reads models in folders alone, else Python."""
    if not Path(job.model).is_dir():
        here = replace(facts, name=str(job.output))
        return ["Next, in Python:", *("  " + line for line in here.code if line)]
    merged = f"{job.output}-merged"
    return next_commands(["merge", job.model, job.output, "--output", merged], ["inspect", merged])
