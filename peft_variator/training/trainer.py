"""The distillation trainer: `transformers.Trainer` with a loss that ties an adapter's model to its dense teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .adapters import TrainedAdapters
from .bookkeeping import EvaluationSums, RunningLosses
from .config import DistillationConfig
from .losses import LossSums
from .objective import HIDDEN_KEYS, build_terms
from .predictions import CAUSAL, prediction_of
from .ratios import TrainedRatios, sample_ratio
from .sampling import sample_examples
from .teacher import InPlaceTeacher, SeparateTeacher, Teacher
from .terms import HiddenTerm, TaskTerm
from .variance import HiddenStateVariance


__all__ = ["DistillationTrainer"]


class DistillationTrainer(Trainer):
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

    # `compute_loss` divides by the items of the whole accumulated batch.
    loss_is_scaled_for_ga = True

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
        self._running = RunningLosses()
        self._evaluation: EvaluationSums | None = None

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
        """Train; see `Trainer.train`. A plugin trained for several `ratios` has its own ratio again afterwards."""
        self._measure_variances(self.train_dataset)
        if self.ratios is None:
            return super().train(*args, **kwargs)
        with self.ratios.restored():
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, at the ratio of its optimizer step; see `Trainer.training_step`."""
        if self.ratios is not None:
            self.ratios.set(sample_ratio(self.ratios.choices, self.args.seed, self.state.global_step))
        return super().training_step(model, inputs, num_items_in_batch)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and how many items each part of the loss has in all of them.

        Returns:
            The micro-batches, and the items on all processes, float of shape `(parts of the loss,)`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._running.start_step()
        items = torch.zeros(len(self.terms), device=device)
        for batch in batches:
            items += torch.stack([term.items(batch).sum().to(device) for term in self.terms.values()])
        return batches, self.accelerator.reduce(items, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the parts of the loss; see `Trainer.compute_loss`.

        Args:
            model: the student, wrapped or not; its mode (training or evaluation) decides what is averaged.
            inputs: the batch.
            return_outputs: whether to return the student's outputs too.
            num_items_in_batch: items of each part of the loss in the whole accumulated batch, from
                `get_batch_samples`. Without it, and in evaluation, the mean over this batch is taken.
        """
        is_training = model.training
        losses, outputs = self._losses(model, inputs)
        if is_training and isinstance(num_items_in_batch, Tensor):
            means = self._shares(losses, num_items_in_batch)
            self._running.add(means)
        else:
            means = {name: sums.mean() for name, sums in losses.items()}
        if self._evaluation is not None:
            self._evaluation.add(losses, self.accelerator)
        loss = torch.stack([self.terms[name].weight * mean for name, mean in means.items()]).sum()
        return (loss, outputs) if return_outputs else loss

    def _shares(self, losses: Mapping[str, LossSums], items: Tensor) -> dict[str, Tensor]:
        """What this micro-batch adds to the means over the accumulated batch; scalars by name.

        Data parallelism averages gradients over processes, which the factor makes a sum.
        """
        processes = self.accelerator.num_processes
        return {
            name: sums.errors.sum() * processes / total.clamp(min=1)
            for (name, sums), total in zip(losses.items(), items, strict=True)
        }

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, LossSums], dict[str, Any]]:
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
        variances = [HiddenStateVariance() for _ in terms]
        mode = self.model.training
        # All processes draw the same sample. What a random collator draws must not shift what training draws.
        with torch.random.fork_rng(devices=[]):
            for inputs in self._sample_batches(dataset):
                outputs = self._teacher_outputs(self.model, inputs)
                for term, variance in zip(terms, variances, strict=True):
                    variance.update(term.states(outputs), term.mask(inputs))
        self.model.train(mode)
        for term, variance in zip(terms, variances, strict=True):
            term.variance = variance.result()

    def _sample_batches(self, dataset: Any) -> Iterator[dict[str, Any]]:
        examples = sample_examples(dataset, self.args.variance_samples)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(examples), size):
            yield self._prepare_inputs(collate(examples[start : start + size]))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, predictions and labels of an evaluation batch; unlike in `Trainer`, a loss needs no labels."""
        if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            # Only some configurations have this attribute; the default is that of `Trainer`.
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", ["past_key_values"])
        predictions = tuple(value for name, value in outputs.items() if name not in [*ignore_keys, "loss"])
        return loss, predictions[0] if len(predictions) == 1 else predictions, None

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
            return self._evaluate_exactly(*arguments)
        by_ratio = {}
        with self.ratios.restored():
            for ratio in sorted(set(self.ratios.choices)):
                self.ratios.set(ratio)
                output = self._evaluate_exactly(*arguments)
                by_ratio[ratio] = output.metrics
        means = {name: sum(each[name] for each in by_ratio.values()) / len(by_ratio) for name in output.metrics}
        single = {f"{name}_k{ratio}": each[name] for ratio, each in by_ratio.items() for name in each}
        return output._replace(metrics=means | single)

    def _evaluate_exactly(self, *arguments: Any) -> EvalLoopOutput:
        """The evaluation of `Trainer`, with losses that are means over the items of the whole set."""
        prefix = arguments[-1]
        self._evaluation = EvaluationSums({name: term.weight for name, term in self.terms.items()})
        try:
            output = super().evaluation_loop(*arguments)
            losses = {f"{prefix}_{name}": value for name, value in self._evaluation.losses().items()}
        finally:
            self._evaluation = None
        return output._replace(metrics={**output.metrics, **losses})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; see `Trainer.log`. The parts of the loss are added to the lines of the training loss."""
        if "loss" in logs:
            logs = {**logs, **self._running.drain(self.accelerator)}
        super().log(logs, start_time)
