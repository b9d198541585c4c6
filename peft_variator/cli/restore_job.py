"""What `peft-variator restore` does: data, adapter, training, measuring, writing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from ..profiling import find_task, load_config
from ..sparsity import measure_sparsity
from ..training import DistillationTrainer, load_plugin
from ..training.restored_card import RestoredFacts, restored_card
from ..tuners.sparse_lora import SparseLoraConfig, SparseLoraLayer
from .checkpoints import check_checkpoints, go_on
from .restore_losses import held_out_losses, label_all, loss_weights, teacher_losses
from .run_settings import RunSettings
from .train_data import TrainingData
from .training_run import load_run_data, load_weights, training_arguments, write_adapter


__all__ = ["RestoreJob"]

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
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight is not None and not 0 <= self.kl_weight <= 1:
            raise ValueError(f"--kl-weight is {self.kl_weight}; it is the λ of (1 − λ)·task + λ·KL, from 0 to 1.")

    def run(self) -> tuple[RestoredFacts, bool]:
        """Train an adapter and write it with its card.

        Returns:
            tuple[RestoredFacts, bool]: what is known about it, and whether this is the process that wrote it.
        """
        check_checkpoints(self)
        task = self.task or find_task(self.model, load_config(self.model))
        # The adapter decides whether there is a teacher, and so which losses there are: before the data is read.
        set_seed(self.seed)
        model = self._adapter(load_weights(self.model, task))
        has_teacher = self._follows_its_base(model) or self.teacher is not None
        weights = loss_weights(self.model, task, self.kl_weight, has_teacher)
        teacher = None if self.teacher is None else load_weights(self.teacher, task)
        data = load_run_data(self, task)
        if task == "causal":
            data = label_all(data)
        with training_arguments(self, prediction_loss_only=True, **weights) as args:
            trainer = DistillationTrainer(
                model,
                args,
                teacher_model=teacher,
                train_dataset=data.train,
                eval_dataset=data.held_out,
                data_collator=data.collate,
            )
            losses = {"dense": teacher_losses(trainer, data), "pruned": held_out_losses(trainer)}
            go_on(trainer, self)
            losses["restored"] = held_out_losses(trainer)
            facts = self._facts(model, data, weights, losses)
            is_first = trainer.is_world_process_zero()
            if is_first:
                write_adapter(self.output, model, restored_card(facts), facts, trainer.state.log_history)
        return facts, is_first

    def _adapter(self, base: PreTrainedModel) -> PeftModel:
        """The base with the adapter to train: the one that was named, or one on the modules that are pruned."""
        if self.adapter is not None:
            model = load_plugin(base, self.adapter)
            if not isinstance(model.peft_config["default"], SparseLoraConfig):
                kind = model.peft_config["default"].peft_type
                raise ValueError(f"--adapter {self.adapter} has the method {kind!s}, not SparseLoRA.")
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
        return get_peft_model(base, SparseLoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=set(pruned)))

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
            name=str(self.output),
            data=self.data,
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
