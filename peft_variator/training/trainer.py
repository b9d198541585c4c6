"""The distillation trainer: a loss that ties an adapter's model to its dense teacher."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput, has_length

from ..compat import BestModelLoader
from ..models import evaluating
from ..tuners.variator import VariatorConfig, VariatorLayer
from ..tuners.variator.correction_fit import fit_correction, needs_fit
from ..tuners.variator.forward_context import calls_of_any_size
from ..tuners.variator.neuron_selection import calibrate, check_outside_of_blocks, needs_calibration
from .attention import AttentionInFloat32
from .config import DistillationConfig
from .exact_loss import ExactLossTrainer
from .loss_masks import CAUSAL, HIDDEN_KEYS, prediction_of
from .loss_terms import EmbeddingTerm, HiddenTerm, TaskTerm, build_terms, measure_variances
from .losses import LossSums
from .teacher import InPlaceTeacher, SeparateTeacher, Teacher, TrainedAdapters


__all__ = ["DistillationTrainer", "sample_examples", "sample_ratio"]


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
        args.check()
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs and would split every batch by nn.DataParallel. Start the run "
                "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        self.adapters = TrainedAdapters(model)
        self.ratios = TrainedRatios(self.adapters, args.ratios) if args.ratios else None
        super().__init__(model=model, args=args, **trainer_arguments)
        base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._takes_use_cache = "use_cache" in signature(base_model.forward).parameters
        self._shifts_labels = prediction_of(base_model) is CAUSAL
        self.terms = build_terms(base_model, args, self.label_names, self._mean_task_loss)
        self.teacher = self._build_teacher(model, teacher_model)

    def _build_teacher(self, model: nn.Module, teacher_model: nn.Module | None) -> Teacher | None:
        if all(isinstance(term, TaskTerm) for term in self.terms.values()):
            return None
        if teacher_model is None:
            return InPlaceTeacher(model, self.adapters)
        # FSDP places the student itself, and nothing else.
        is_placed = self.place_model_on_device or self.is_fsdp_enabled
        # A model spread over devices by a device map, like the student's own, stays where it is.
        if is_placed and getattr(teacher_model, "hf_device_map", None) is None:
            self._move_model_to_device(teacher_model, self.args.device)
        return SeparateTeacher(teacher_model, model)

    def calibrate(self) -> None:
        """Have a new plugin learn from a sample of the training data what it copies, keeps and corrects.

        That is `peft_variator.calibrate`, and then `peft_variator.fit_correction` on `fit_samples` examples.
        Nothing happens where the plugin needs none, or there is no training data.
        """
        if self.train_dataset is None:
            return
        with torch.random.fork_rng(devices=[]), self.accelerator.autocast():
            ratios = self.args.ratios
            if needs_calibration(self.model, ratios):
                batches = self._sample_batches(self.train_dataset, self.model, self.args.variance_samples)
                calibrate(self.model, batches, ratios)
            if self.args.fit_samples and needs_fit(self.model, ratios):
                batches = self._sample_batches(self.train_dataset, self.model, self.args.fit_samples)
                fit_correction(self.model, batches, ratios)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `Trainer.train`. A plugin trained for several `ratios` has its own ratio again afterwards.

        A new plugin is calibrated first, see [`calibrate`](DistillationTrainer.calibrate); the configuration of the
        plugin says afterwards which ratios it was trained for.

        Raises:
            ValueError: nothing but a plugin is trained, and it merges nothing at the ratio it has; or the call stands
                inside of a `using_ratio` block.
        """
        check_outside_of_blocks(self.model, "train")
        check_merges(self.model, self.adapters, self.args.ratios)
        self.calibrate()
        before = note_trained_ratios(self.adapters, self.args.ratios)
        try:
            self._measure_variances(self.train_dataset)
            with nullcontext() if self.ratios is None else self.ratios.restored():
                return super().train(*args, **kwargs)
        except BaseException:
            if self.state.global_step == 0:
                for config, ratios in before:
                    config.trained_ratios = ratios
            raise

    def load_best_model(self) -> None:
        """Give the trained adapters, whatever their names, the weights of the best checkpoint.

        Raises:
            FileNotFoundError: the checkpoint holds no such adapter.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().load_best_model()  # their checkpoints hold the whole model
        else:
            self.adapters.load(self.model, str(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapters whole; see `Trainer.save_model`, which writes none where FSDP saves shards.

        A checkpoint of an earlier run that is written over is marked as not whole: no run goes on from what a killed
        process leaves of both.
        """
        if _internal_call and output_dir is not None and self.args.should_save:
            Path(output_dir, TRAINER_STATE_NAME).unlink(missing_ok=True)  # written again as the last file
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            adapters = self.gather_adapters()
            self.model.save_pretrained(
                output_dir or self.args.output_dir, state_dict=adapters, is_main_process=self.args.should_save
            )
        super().save_model(output_dir, _internal_call)

    def gather_adapters(self) -> dict[str, Tensor] | None:
        """What `save_pretrained` takes as `state_dict`: adapters that FSDP has spread over processes, whole.

        All processes have to call it. The base stays where it is.

        Returns:
            Tensors by name, on the CPU; `None` if nothing is spread.
        """
        if not self.is_fsdp_enabled:
            return None
        parts = self.model.state_dict()
        configs = getattr(self.model, "peft_config", None)  # also of a model that transformers added adapters to
        if configs:
            kept = {
                id(part)
                for name in configs
                for part in get_peft_model_state_dict(self.model, state_dict=parts, adapter_name=name).values()
            }
            parts = {key: part for key, part in parts.items() if id(part) in kept}
        return {key: (part.full_tensor() if isinstance(part, DTensor) else part).cpu() for key, part in parts.items()}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, at the ratio of its optimizer step; see `Trainer.training_step`."""
        if self.ratios is not None:
            self.ratios.set(sample_ratio(self.ratios.choices, self.args.seed, self.state.global_step))
        on_cpu = self.args.device.type == "cpu" and not self.args.torch_compile
        with AttentionInFloat32() if on_cpu else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    @calls_of_any_size()
    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, LossSums], dict[str, Any]]:
        """The parts of the loss of a batch, and the student's outputs without what was asked for their sake."""
        self._measure_variances(self.train_dataset)
        if model.training and not self.args.base_dropout:
            self.adapters.train_alone(self.model)  # the rest of the model, so the teacher too, is in evaluation mode
            teacher = self._teacher_outputs(model, inputs)
        else:
            teacher = self._teacher_outputs_without_dropout(model, inputs)
        outputs = model(**{**inputs, **self._extra_arguments})
        losses = {name: term.loss(outputs, teacher, inputs) for name, term in self.terms.items()}
        return losses, {name: value for name, value in outputs.items() if name not in HIDDEN_KEYS}

    @property
    def _extra_arguments(self) -> dict[str, bool]:
        needs_states = any(isinstance(term, HiddenTerm | EmbeddingTerm) for term in self.terms.values())
        # Nothing is generated; and a layer that runs again in the backward pass would add to its cache again.
        return {
            **({"output_hidden_states": True} if needs_states else {}),
            **({"use_cache": False} if self._takes_use_cache else {}),
        }

    def _teacher_outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.teacher is None:
            return {}
        with self.accelerator.autocast():
            return self.teacher.outputs(model, {**inputs, **self._extra_arguments})

    def _teacher_outputs_without_dropout(self, model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """As `_teacher_outputs`, whatever mode the model is in."""
        mode = model.training
        if mode:
            model.eval()
        outputs = self._teacher_outputs(model, inputs)
        if mode:
            model.train()
        return outputs

    def _mean_task_loss(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        """The task loss as the mean over a batch, by the means that `Trainer` offers."""
        labels = inputs.get("labels")  # of question answering there are two columns, by other names
        if self.compute_loss_func is not None:
            return self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        if self.label_smoother is not None and labels is not None:
            return self.label_smoother(outputs, labels, shift_labels=self._shifts_labels)
        return outputs["loss"]

    def _measure_variances(self, dataset: Any) -> None:
        """Measure the scale of the teacher's hidden states, the first time that it is needed."""
        terms = [term for term in self.terms.values() if isinstance(term, HiddenTerm) and term.variance is None]
        if not terms:
            return
        if dataset is None:
            raise ValueError("The scale of hidden states is measured on data: pass train_dataset or eval_dataset.")
        # All processes draw the same sample. What a random collator draws must not shift what training draws.
        with evaluating(self.model), torch.random.fork_rng(devices=[]):
            teacher = self.teacher.model if isinstance(self.teacher, SeparateTeacher) else self.model
            batches = self._sample_batches(dataset, teacher, self.args.variance_samples)
            measure_variances(terms, ((inputs, self._teacher_outputs(self.model, inputs)) for inputs in batches))

    def _sample_batches(self, dataset: Any, model: nn.Module, count: int) -> Iterator[dict[str, Any]]:
        """Batches of up to `count` examples of a data set, for a model that is run outside of training."""
        # Whoever asks for batches may run the model in lower precision: data is made as in training, without.
        without_autocast = partial(torch.autocast, self.args.device.type, enabled=False)
        with without_autocast():
            examples = sample_examples(dataset, count)
        collate = self._get_collator_with_removed_columns(self.data_collator)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(examples), size):
            with without_autocast():
                inputs = self._prepare_inputs(collate(examples[start : start + size]))
            # Until FSDP shards the student, which happens when training starts, it is where it was loaded.
            yield send_to_device(inputs, next(model.parameters()).device) if self.is_fsdp_enabled else inputs

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """See `Trainer.predict`. With `ratios` too, there is one answer: at the ratio that the plugin has."""
        ratios, self.ratios = self.ratios, None
        try:
            return super().predict(*args, **kwargs)
        finally:
            self.ratios = ratios

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; see `Trainer.evaluation_loop`. With `ratios`, it evaluates at each of them.

        Raises:
            ValueError: there are `ratios`, and the call stands inside of a `using_ratio` block, whose ratio counts.
        """
        if self.ratios is not None:
            check_outside_of_blocks(self.model, "evaluate, which takes the ratios of the training by turns,")
        self._measure_variances(self.train_dataset if self.train_dataset is not None else dataloader.dataset)
        if self.ratios is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        by_ratio = {}
        with self.ratios.restored():
            for ratio in sorted(set(self.ratios.choices)):
                self.ratios.set(ratio)
                output = super().evaluation_loop(dataloader, *args, **kwargs)
                by_ratio[ratio] = output.metrics
        return output._replace(metrics=average_over_ratios(by_ratio))


def sample_ratio(ratios: Sequence[int], seed: int, step: int) -> int:
    """Draw the ratio of a step.

    It depends on nothing but the arguments, so all processes, all micro-batches of the step and a run that was resumed
    at the step draw the same one.

    Args:
        ratios: compression ratios to draw from, each equally likely.
        seed: seed of the run.
        step: number of optimizer steps done before this one.
    """
    return random.Random(f"compression ratio, seed {seed}, step {step}").choice(ratios)


def average_over_ratios(by_ratio: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of several ratios as one: the mean under each name, and those of ratio 4 under `NAME_k4`.

    What is no number at every ratio, as a report by class, has no mean.
    """
    names = next(iter(by_ratio.values()))
    values: dict[str, list[Any]] = {name: [metrics.get(name) for metrics in by_ratio.values()] for name in names}
    means = {
        name: sum(each) / len(each) for name, each in values.items() if all(isinstance(value, Real) for value in each)
    }
    return means | {f"{name}_k{ratio}": metrics[name] for ratio, metrics in by_ratio.items() for name in metrics}


def note_trained_ratios(
    adapters: TrainedAdapters, ratios: Sequence[int] | None
) -> list[tuple[VariatorConfig, list[int] | None]]:
    """Have the configurations of the trained plugins say which ratios they are trained for.

    Returns:
        The configurations, with what they said before.
    """
    before: dict[int, tuple[VariatorConfig, list[int] | None]] = {}  # modules share a configuration
    for layer, name in _plugins_of(adapters):
        config = layer.configs[name]
        before.setdefault(id(config), (config, config.trained_ratios))
        own = layer.ratios.chosen.get(name, config.compression_ratio)
        config.trained_ratios = sorted(set(ratios or [own]) - {1}) or None
    return list(before.values())


def check_merges(model: nn.Module, adapters: TrainedAdapters, ratios: Sequence[int] | None) -> None:
    """Refuse to train a plugin alone that merges nothing, which leaves no gradient to anything.

    Raises:
        ValueError: so it is.
    """
    plugins = _plugins_of(adapters)
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if not plugins or not all("variator_" in name for name in trained):
        return
    chosen = [
        (layer, name, ratio)
        for layer, name in plugins
        for ratio in ([layer.ratios.chosen.get(name)] if ratios is None else ratios)
    ]
    if all(layer.rule_at(name, ratio).ratio == 1 for layer, name, ratio in chosen):
        raise ValueError(
            "The plugin merges nothing at compression_ratio=1, where the model is its base, so there is nothing to "
            "train. Choose a ratio with set_compression_ratio, or pass ratios=[2, 4, 8]."
        )


def _plugins_of(adapters: TrainedAdapters) -> list[tuple[VariatorLayer, str]]:
    return [(layer, name) for layer, names in adapters.layers if isinstance(layer, VariatorLayer) for name in names]


class TrainedRatios:
    """The ratios of the Variator plugin that a run trains.

    Raises:
        ValueError: no Variator plugin is trained, or its scores are tied to another ratio (`scoring="concat"`).
    """

    def __init__(self, adapters: TrainedAdapters, ratios: Sequence[int]) -> None:
        self.choices = tuple(ratios)
        self._plugins = _plugins_of(adapters)
        if not self._plugins:
            raise ValueError(
                f"ratios={list(ratios)} is for Variator plugins, and the model trains none. Set ratios=None."
            )
        for layer, name in self._plugins:
            for ratio in ratios:
                layer.rule_at(name, ratio)  # raises for one that it can't serve

    def set(self, ratio: int) -> None:
        """Let every module of the plugin compress by `ratio`."""
        for layer, name in self._plugins:
            layer.ratios.choose(name, ratio)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Give every module the ratio back that it had before."""
        before = [layer.ratios.chosen.get(name) for layer, name in self._plugins]
        try:
            yield
        finally:
            for (layer, name), ratio in zip(self._plugins, before, strict=True):
                layer.ratios.choose(name, ratio)


def sample_examples(dataset: Any, count: int) -> list[Any]:
    """Up to `count` examples, spread evenly over the data set, or the first ones of a stream."""
    if not has_length(dataset) or isinstance(dataset, IterableDataset):
        return list(islice(dataset, count))
    count = min(count, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]
