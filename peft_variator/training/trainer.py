"""The distillation trainer: a loss that ties an adapter's model to its dense teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..compat import BestModelLoader
from ..tuners.variator.calibration import calibrate, needs_calibration
from .adapters import TrainedAdapters
from .config import DistillationConfig
from .exact_losses import ExactLossTrainer
from .losses import LossSums
from .objective import HIDDEN_KEYS, build_terms
from .predictions import CAUSAL, prediction_of
from .ratios import TrainedRatios, average_over_ratios, note_trained_ratios, sample_ratio
from .sampling import sample_examples
from .teacher import InPlaceTeacher, SeparateTeacher, Teacher
from .terms import HiddenTerm, TaskTerm
from .variance import measure_variances


__all__ = ["DistillationTrainer"]


class DistillationTrainer(BestModelLoader, ExactLossTrainer):
    """Trains the adapters of a model so that it does what the model does without them, what its labels say, or both.

    Made for Variator plugins (stage one on plain text, stage two on a task, starting from the plugin of stage one;
    see Xiao et al. 2023, https://arxiv.org/abs/2310.15724) and for SparseLoRA (He et al. 2024,
    https://arxiv.org/abs/2404.02424: `task_weight=1 - λ`, `logits_weight=λ`). The teacher is the model with the
    adapters that are trained switched off, and costs no memory of its own; all others, such as a task LoRA, stay on.
    Teacher and student run without the base's dropout (see `DistillationConfig.base_dropout`).

    Every part of the loss is logged by its name (`hidden_loss`, or `encoder_hidden_loss` and `decoder_hidden_loss`,
    `logits_loss`, `task_loss`), unweighted. Evaluation gives the same parts as means over the whole evaluation set,
    and `eval_loss` as their weighted sum. With `ratios` it runs once for each ratio: `eval_loss_k4` is that of ratio 4
    and `eval_loss` the mean over ratios, and so for all other metrics.

    Args:
        model: model with a trainable adapter.
        args: arguments of the run.
        teacher_model: another model to follow, such as the dense version of a pruned base. It is put into evaluation
            mode and gets no gradients.
        trainer_arguments: everything else that `Trainer` takes (`train_dataset`, `eval_dataset`, `data_collator`, …).

    Raises:
        TypeError: `args` is not a `DistillationConfig`.
        ValueError: the model has no trainable adapter, trains parameters that its teacher shares, or has nothing that
            a part of the loss with a weight could be computed from; or there is more than one GPU in one process.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: nn.Module,
        args: DistillationConfig,
        *,
        teacher_model: nn.Module | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args is a {type(args).__name__}; DistillationTrainer takes a DistillationConfig.")
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs and would split every batch by nn.DataParallel. Start the run "
                "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.adapters = TrainedAdapters(model)
        self.ratios = TrainedRatios(self.adapters, args.ratios) if args.ratios else None
        super().__init__(model=model, args=args, **trainer_arguments)
        base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._shifts_labels = prediction_of(base_model) is CAUSAL
        self.terms = build_terms(base_model, args, self.label_names, self._mean_task_loss)
        self.teacher = self._build_teacher(model, teacher_model)

    def _build_teacher(self, model: nn.Module, teacher_model: nn.Module | None) -> Teacher | None:
        if all(isinstance(term, TaskTerm) for term in self.terms.values()):
            return None
        if teacher_model is None:
            return InPlaceTeacher(model, self.adapters)
        # A model spread over devices by a device map, like the student's own, stays where it is.
        if self.place_model_on_device and getattr(teacher_model, "hf_device_map", None) is None:
            self._move_model_to_device(teacher_model, self.args.device)
        return SeparateTeacher(teacher_model, model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `Trainer.train`. A plugin trained for several `ratios` has its own ratio again afterwards.

        A new plugin with `decompression="neurons"` is calibrated first, see [`calibrate`]; the configuration of the
        plugin says afterwards which ratios it was trained for.
        """
        if self.train_dataset is not None and needs_calibration(self.model):
            with torch.random.fork_rng(devices=[]):
                calibrate(self.model, self._sample_batches(self.train_dataset))
        note_trained_ratios(self.adapters, self.args.ratios)
        self._measure_variances(self.train_dataset)
        if self.ratios is None:
            return super().train(*args, **kwargs)
        with self.ratios.restored():
            return super().train(*args, **kwargs)

    def load_best_model(self) -> None:
        """Give the trained adapters, whatever their names, the weights of the best checkpoint.

        Raises:
            FileNotFoundError: the checkpoint holds no such adapter.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().load_best_model()  # their checkpoints hold the whole model
        else:
            self.adapters.load(self.model, str(self.state.best_model_checkpoint))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, at the ratio of its optimizer step; see `Trainer.training_step`."""
        if self.ratios is not None:
            self.ratios.set(sample_ratio(self.ratios.choices, self.args.seed, self.state.global_step))
        return super().training_step(model, inputs, num_items_in_batch)

    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, LossSums], dict[str, Any]]:
        """The parts of the loss of a batch, and the student's outputs without what was asked for their sake."""
        self._measure_variances(self.train_dataset)
        is_training = model.training
        teacher = self._teacher_outputs(model, inputs)
        if is_training:
            model.train()
            if not self.args.base_dropout:
                self.adapters.train_alone(self.model)
        outputs = model(**inputs, **self._extra_arguments)
        losses = {name: term.loss(outputs, teacher, inputs) for name, term in self.terms.items()}
        return losses, {name: value for name, value in outputs.items() if name not in HIDDEN_KEYS}

    @property
    def _extra_arguments(self) -> dict[str, bool]:
        needs_states = any(isinstance(term, HiddenTerm) for term in self.terms.values())
        return {"output_hidden_states": True} if needs_states else {}

    def _teacher_outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.teacher is None:
            return {}
        with self.accelerator.autocast():
            return self.teacher.outputs(model, {**inputs, **self._extra_arguments})

    def _mean_task_loss(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        """The task loss as the mean over a batch, by the means that `Trainer` offers."""
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=None)
        if self.label_smoother is not None:
            return self.label_smoother(outputs, inputs["labels"], shift_labels=self._shifts_labels)
        return outputs["loss"]

    def _measure_variances(self, dataset: Any) -> None:
        """Measure the scale of the teacher's hidden states, the first time that it is needed."""
        terms = [term for term in self.terms.values() if isinstance(term, HiddenTerm) and term.variance is None]
        if not terms:
            return
        if dataset is None:
            raise ValueError("The scale of hidden states is measured on data: pass train_dataset or eval_dataset.")
        mode = self.model.training
        # All processes draw the same sample. What a random collator draws must not shift what training draws.
        with torch.random.fork_rng(devices=[]):
            batches = self._sample_batches(dataset)
            measure_variances(terms, ((inputs, self._teacher_outputs(self.model, inputs)) for inputs in batches))
        self.model.train(mode)

    def _sample_batches(self, dataset: Any) -> Iterator[dict[str, Any]]:
        examples = sample_examples(dataset, self.args.variance_samples)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(examples), size):
            yield self._prepare_inputs(collate(examples[start : start + size]))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, or predict; see `Trainer.evaluation_loop`. With `ratios`, it evaluates at each of them."""
        self._measure_variances(self.train_dataset if self.train_dataset is not None else dataloader.dataset)
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.ratios is None or description == "Prediction":
            return super().evaluation_loop(*arguments)
        by_ratio = {}
        with self.ratios.restored():
            for ratio in sorted(set(self.ratios.choices)):
                self.ratios.set(ratio)
                output = super().evaluation_loop(*arguments)
                by_ratio[ratio] = output.metrics
        return output._replace(metrics=average_over_ratios(by_ratio))
