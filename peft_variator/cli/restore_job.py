"""What `peft-variator restore` does: data, adapter, training, measuring, writing."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..files import check_new_folder, new_folder, write_text
from ..profiling import build_model, find_task, load_config
from ..profiling.shapes import Task
from ..sparsity import measure_sparsity
from ..training import DistillationConfig, DistillationTrainer, load_plugin
from ..training.restored_card import RestoredFacts, restored_card
from ..tuners.sparse_lora import SparseLoraConfig, SparseLoraLayer
from .train_data import Examples, TrainingData, load_data


__all__ = ["RestoreJob"]

# λ of He et al. 2024 (arXiv 2404.02424): the loss is (1 − λ)·task + λ·KL.
KL_WEIGHT = 0.1
# A dense weight can hold a zero by chance; a pruned one holds far more.
LEAST_SPARSITY = 0.01


@dataclass
class RestoreJob:
    """Settings of a run; each is an option of the command.

    Raises:
        ValueError: a setting is out of range.
        FileExistsError: the output folder exists and is not empty.
    """

    model: str
    data: str
    output: Path
    teacher: str | None = None
    adapter: str | None = None
    kl_weight: float | None = None
    rank: int = 8
    alpha: float = 16.0
    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    lr: float = 1e-3
    max_length: int = 128
    held_out: int = 128
    text_column: str = "text"
    split: str = "train"
    task: Task | None = None
    bf16: bool = False
    checkpoints: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it has to be at least 1.")
        if self.kl_weight is not None and not 0 <= self.kl_weight <= 1:
            raise ValueError(f"--kl-weight is {self.kl_weight}; it is the λ of (1 − λ)·task + λ·KL, from 0 to 1.")
        check_new_folder(self.output)

    @property
    def command(self) -> str:
        """The command line of these settings: what differs from the defaults."""
        words = ["peft-variator", "restore", self.model]
        for option in fields(self)[1:]:
            value, name = getattr(self, option.name), "--" + option.name.replace("_", "-")
            if option.default is MISSING or value != option.default:
                words += [name] if value is True else [name, str(value)]
        return shlex.join(words)

    def run(self) -> tuple[RestoredFacts, bool]:
        """Train an adapter and write it with its card.

        Returns:
            tuple[RestoredFacts, bool]: what is known about it, and whether this is the process that wrote it.
        """
        config = load_config(self.model)
        task = self.task or find_task(self.model, config)
        # The adapter decides whether there is a teacher, and so which losses there are: before the data is read.
        set_seed(self.seed)
        model = self._adapter(self._build(self.model, task))
        stored = model.peft_config["default"].mask == "stored"
        weights = self._weights(task, has_teacher=stored or self.teacher is not None)
        if stored and self.teacher is not None:
            raise ValueError("The adapter stores its masks, so its dense base is the teacher. Leave --teacher out.")
        teacher = None if self.teacher is None else self._build(self.teacher, task)
        data = self._load_data(task)
        with self._trainer(model, teacher, weights, data) as trainer:
            dense = _teacher_losses(trainer, data) if stored or teacher is not None else {}
            before = _losses(trainer)
            trainer.train(resume_from_checkpoint=self._last_checkpoint())
            facts = self._facts(model, data, weights, {"dense": dense, "pruned": before, "restored": _losses(trainer)})
            is_first = trainer.is_world_process_zero()
            if is_first:
                self._write(model, facts, trainer.state.log_history)
        return facts, is_first

    def _build(self, name: str, task: Task) -> PreTrainedModel:
        cpu = torch.device("cpu")
        return build_model(name, load_config(name), task, dtype=torch.float32, device=cpu, random_weights=False)

    def _adapter(self, base: PreTrainedModel) -> PeftModel:
        """The base with the adapter to train, on the modules that are pruned."""
        if self.adapter is not None:
            model = load_plugin(base, self.adapter)
            if not isinstance(model.peft_config["default"], SparseLoraConfig):
                kind = model.peft_config["default"].peft_type
                raise ValueError(f"--adapter {self.adapter} has the method {kind!s}, not SparseLoRA.")
            return model
        pruned = [row.name for row in measure_sparsity(base).modules if row.sparsity >= LEAST_SPARSITY]
        if not pruned:
            raise ValueError(
                f"No linear layer of {self.model} is pruned, so there is nothing to restore. Prune it first: "
                "peft-variator prune MODEL --pattern 2:4 --data FILE --output DIR. If its masks are stored in an "
                "adapter, name that with --adapter."
            )
        return get_peft_model(base, SparseLoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=set(pruned)))

    def _weights(self, task: Task, has_teacher: bool) -> dict[str, Any]:
        """Weights of the parts of the loss, fields of `DistillationConfig`."""
        if task in ("causal", "seq2seq"):
            weight = self.kl_weight
            if weight is None:
                weight = KL_WEIGHT if has_teacher else 0.0
            if weight and not has_teacher:
                raise ValueError(f"--kl-weight is {weight}, but there is no dense model to follow. Name --teacher.")
            return {"task_weight": 1.0 - weight, "logits_weight": weight, "hidden_weight": 0.0}
        if self.kl_weight is not None:
            raise ValueError(f"--kl-weight needs predictions; {self.model} is used as {task}, and follows states.")
        if not has_teacher:
            raise ValueError(
                f"{self.model} is used as {task}: it has no loss of its own on plain data, and follows the hidden "
                "states of the dense model. Name that with --teacher."
            )
        return {"task_weight": 0.0, "logits_weight": 0.0, "hidden_weight": 1.0}

    def _load_data(self, task: Task) -> TrainingData:
        data = load_data(
            self.model,
            task,
            self.data,
            column=self.text_column,
            split=self.split,
            max_length=self.max_length,
            wanted=self.steps * self.batch_size * self.accumulation + self.held_out,
            held_out=self.held_out,
            seed=self.seed,
        )
        if task != "causal":
            return data
        return replace(data, train=_all_labelled(data.train), held_out=_all_labelled(data.held_out))

    @contextmanager
    def _trainer(
        self, model: PeftModel, teacher: PreTrainedModel | None, weights: dict[str, Any], data: TrainingData
    ) -> Iterator[DistillationTrainer]:
        with tempfile.TemporaryDirectory(prefix="peft-variator-restore-") as scratch:
            args = DistillationConfig(
                output_dir=str(self.checkpoints or scratch),
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=self.batch_size,
                gradient_accumulation_steps=self.accumulation,
                learning_rate=self.lr,
                bf16=self.bf16,
                seed=self.seed,
                logging_steps=max(1, self.steps // 20),
                save_strategy="no" if self.checkpoints is None else "steps",
                save_steps=max(1, self.steps // 10),
                prediction_loss_only=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                **weights,
            )
            yield DistillationTrainer(
                model,
                args,
                teacher_model=teacher,
                train_dataset=data.train,
                eval_dataset=data.held_out,
                data_collator=data.collate,
            )

    def _last_checkpoint(self) -> str | None:
        exists = self.checkpoints is not None and self.checkpoints.is_dir()
        return get_last_checkpoint(str(self.checkpoints)) if exists else None

    def _facts(
        self, model: PeftModel, data: TrainingData, weights: dict[str, float], losses: dict[str, dict[str, float]]
    ) -> RestoredFacts:
        layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
        masks = [layer.get_mask("default") for layer in layers]
        return RestoredFacts(
            base=self.model,
            model_class=type(model.get_base_model()).__name__,
            name=str(self.output),
            data=self.data,
            teacher=self.model if model.peft_config["default"].mask == "stored" else self.teacher,
            weights=weights,
            steps=self.steps,
            held_out=len(data.held_out),
            parameters=sum(value.numel() for value in model.parameters() if value.requires_grad),
            modules=len(layers),
            masked=1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks),
            command=self.command,
            losses=losses,
        )

    def _write(self, model: PeftModel, facts: RestoredFacts, log: list[dict[str, Any]]) -> None:
        with new_folder(self.output) as folder:
            model.save_pretrained(str(folder))
            restored_card(facts).save(folder / "README.md")
            write_text(folder / "training.json", json.dumps({"facts": asdict(facts), "log": log}, indent=2) + "\n")


def _all_labelled(rows: Examples) -> list[dict[str, Any]]:
    """Examples in which every token is predicted: nothing is merged here, so no part of a text is a mere prompt."""
    examples: list[dict[str, Any]] = [rows[index] for index in range(len(rows))]
    return [{**example, "labels": example["input_ids"]} for example in examples]


def _losses(trainer: DistillationTrainer) -> dict[str, float]:
    """The parts of the loss on the held-out data, by name, as means over predictions or tokens."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}_loss"] for name in trainer.terms}


@torch.no_grad()
def _teacher_losses(trainer: DistillationTrainer, data: TrainingData) -> dict[str, float]:
    """The task loss of the dense model itself; it follows itself perfectly."""
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
