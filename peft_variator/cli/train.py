"""`peft-variator train`: a model and text or images in, a compression plugin with its model card out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftModel, PeftType, get_peft_model
from rich.filesize import decimal
from transformers import PreTrainedModel, set_seed

from ..models import Task
from ..profiling import allocate, count_flops, find_task, load_config
from ..profiling.benchmark import count_added_parameters
from ..profiling.inputs import without_padding
from ..sentence_folder import loading_class, sentence_files
from ..training import DistillationTrainer, load_plugin
from ..training.evaluation import measure_quality
from ..training.model_card import PluginFacts, RatioFacts, plugin_card
from ..tuners.variator import VariatorConfig
from ..tuners.variator.layer import plugin_layers
from .console import Reporter, next_commands
from .examples import TrainingData, data_words
from .training_run import (
    RunSettings,
    check_checkpoints,
    config_of_checkpoint,
    load_run_data,
    load_weights,
    show_only_a_bar,
    tell_of_run,
    train_or_resume,
    training_arguments,
    write_adapter,
)


__all__ = ["TrainJob", "train"]

# Hidden states are followed in any case; a causal language model is judged by its predictions, too.
LOGITS_WEIGHTS: dict[Task, float] = {"causal": 1.0, "seq2seq": 0.0, "encoder": 0.0, "vision": 0.0}


# Fields of `VariatorConfig` that are passed on as they are.
PLUGIN_OPTIONS = (
    "bottleneck_dim",
    "decompression",
    "correction_rank",
    "compensation_rank",
    "keep_last_tokens",
    "keep_outliers",
    "layer_spans",
)
ALLOCATION_BATCHES = 4


@dataclass
class TrainJob(RunSettings):
    """Settings of a run that trains a plugin; each is an option of the command.

    Raises:
        ValueError: a setting is out of range, or the model has no pretrained weights.
        FileExistsError: the output folder exists and is not empty.
    """

    subcommand: ClassVar[str] = "train"

    ratio: list[int] | None = None
    hidden_loss: str = "all"
    logits_weight: float | None = None
    bottleneck_dim: int | None = None
    decompression: str | None = None
    correction_dim: str | None = None
    correction_rank: int | None = None
    compensation_rank: int | None = None
    keep_last_tokens: int | None = None
    keep_outliers: float | None = None
    layer_spans: list[list[int]] | None = None
    flops_saved: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for ratio in self.ratio or ():
            if ratio < 2:
                raise ValueError(f"The ratio {ratio} compresses nothing, so there is nothing to train. Use 2 or more.")
        for option in (*PLUGIN_OPTIONS, "correction_dim", "flops_saved"):
            if self.adapter is not None and getattr(self, option) is not None:
                name = option.replace("_", "-")
                raise ValueError(f"--{name} is that of the plugin in --adapter. Leave one of them out.")
        self._plugin_options()  # raises for what is none
        if self.flops_saved is not None and len(self.flops_saved) != len(self._new_ratios()):
            raise ValueError(
                f"--flops-saved names {len(self.flops_saved)} shares for {len(self._new_ratios())} ratios. Give one "
                "for each --ratio, in the same order."
            )

    def run(self, reporter: Reporter) -> tuple[PluginFacts, bool]:
        """Train a plugin and write it with its card.

        Returns:
            tuple[PluginFacts, bool]: what is known about the plugin, and whether this is the process that wrote it.
        """
        check_checkpoints(self)
        beside = sentence_files(self.model)
        task = self.task or find_task(self.model, load_config(self.model))
        data = load_run_data(self, task, reporter)
        set_seed(self.seed)
        plugin, ratios = self._plugin(load_weights(self.model, task), data)
        with training_arguments(self, task, **self._objective(task, ratios)) as args:
            trainer = DistillationTrainer(plugin, args, train_dataset=data.train, data_collator=data.collate)
            show_only_a_bar(trainer)
            if self.keep_outliers is not None:
                trainer.calibrate()  # or nothing could be merged yet
            before = self._qualities(plugin, ratios, data)
            train_or_resume(trainer, self, reporter)
            # As it will be called, and was before: without the autocast that the accelerator puts around it.
            trainer.accelerator.unwrap_model(plugin, keep_fp32_wrapper=False)
            after = self._qualities(plugin, ratios, data)
            flops = self._flops(plugin, task, [1, *ratios], data)
            rows = [RatioFacts(k, flops[1], flops[k], before[k], after[k]) for k in ratios]
            facts = self._facts(plugin, data, rows)
            return facts, write_adapter(self, plugin, trainer, facts, plugin_card, beside)

    def _plugin(self, base: PreTrainedModel, data: TrainingData) -> tuple[PeftModel, list[int]]:
        """The base with the plugin to train, and the ratios to train it for, the first of which it gets."""
        if self.adapter is not None:
            return self._old_plugin(base, self.adapter)
        ratios = self._new_ratios()
        options: dict[str, Any] = {"compression_ratio": ratios[0]}
        options |= self._plugin_options()
        config = VariatorConfig(**options)
        if data.tokenizer is not None:
            config = VariatorConfig.from_tokenizer(data.tokenizer, **options)
            options["keep_token_ids"] = config.keep_token_ids
        begun = None if self.flops_saved is None else config_of_checkpoint(self)
        if begun is not None:  # what data chose is not chosen again
            found = {name: getattr(begun, name) for name in ("ratio_schedule", "correction_pattern")}
            config = VariatorConfig(**options, **found)
        elif self.flops_saved is not None:
            shares = dict(zip(ratios, self.flops_saved, strict=True))
            batches = data.drawn_batches(ALLOCATION_BATCHES, self.batch_size, base.device, self.seed)
            length = None if data.tokenizer is None else self.max_length
            config = allocate(base, batches, shares, length=length, **options)
        return get_peft_model(base, config), ratios

    def _new_ratios(self) -> list[int]:
        """The ratios of a new plugin."""
        return self.ratio or [VariatorConfig().compression_ratio]

    def _plugin_options(self) -> dict[str, Any]:
        """The fields of the configuration that say how a row is given back to its tokens."""
        options: dict[str, Any] = {name: getattr(self, name) for name in PLUGIN_OPTIONS}
        if self.correction_dim is not None:
            try:
                options["correction_dim"] = (float if "." in self.correction_dim else int)(self.correction_dim)
            except ValueError as error:
                raise ValueError(
                    f"--correction-dim {self.correction_dim}: give a number of neurons, or a share as in 0.25."
                ) from error
        options = {name: value for name, value in options.items() if value is not None}
        VariatorConfig(**options)
        return options

    def _old_plugin(self, base: PreTrainedModel, name: str) -> tuple[PeftModel, list[int]]:
        plugin = load_plugin(base, name)
        config = plugin.peft_config["default"]
        if not isinstance(config, VariatorConfig):
            raise ValueError(
                f"--adapter {name} has the method {PeftType(config.peft_type).value}, not a Variator plugin."
            )
        if self.ratio is None:
            own, trained = config.compression_ratio, config.trained_ratios or []
            if config.ratio_pattern or config.scoring != "token":
                trained = []  # the pattern, or the scorers' shapes, are of one ratio
            return plugin, [own, *(ratio for ratio in trained if ratio != own)]
        plugin.set_compression_ratio(self.ratio[0])
        config.compression_ratio = self.ratio[0]
        if config.scoring == "token":  # else the scorers' shapes are those of the pattern, which counts on
            config.ratio_pattern = {}
        return plugin, self.ratio

    def _choose(self, plugin: PeftModel, ratio: int) -> None:
        """Have a plugin compress by a ratio; by its own as its `ratio_pattern` says, unless --ratio names it."""
        config = plugin.peft_config["default"]
        if self.ratio is None and config.ratio_pattern and ratio == config.compression_ratio:
            for layer in plugin_layers(plugin):
                layer.ratios.choose("default", None)
        else:
            plugin.set_compression_ratio(ratio)

    def _objective(self, task: Task, ratios: list[int]) -> dict[str, Any]:
        """What the plugin is trained for, fields of `DistillationConfig`."""
        return {
            "hidden_loss": self.hidden_loss,
            "logits_weight": LOGITS_WEIGHTS[task] if self.logits_weight is None else self.logits_weight,
            "ratios": ratios if len(ratios) > 1 else None,
        }

    def _qualities(self, plugin: PeftModel, ratios: list[int], data: TrainingData) -> dict[int, dict[str, float]]:
        qualities = {}
        for ratio in ratios:
            self._choose(plugin, ratio)
            qualities[ratio] = measure_quality(plugin, data.held_out_batches(self.batch_size, plugin.device))
        self._choose(plugin, ratios[0])
        return qualities

    def _flops(self, plugin: PeftModel, task: Task, ratios: list[int], data: TrainingData) -> dict[int, int]:
        """Operations of one held-out batch at each ratio: of a causal model the prefill, as `generate` runs it.

        Padding counts as text: what a plugin saves by leaving it out depends on how texts are put together.
        """
        inputs = next(data.held_out_batches(self.batch_size, plugin.device))
        if "attention_mask" in inputs:
            inputs = without_padding(inputs)
        if task == "causal":
            del inputs["labels"]
            inputs |= {"use_cache": True, "logits_to_keep": 1}
        counted = {}
        for ratio in ratios:
            self._choose(plugin, ratio)
            counted[ratio] = count_flops(plugin.eval(), inputs)
        return counted

    def _facts(self, plugin: PeftModel, data: TrainingData, ratios: list[RatioFacts]) -> PluginFacts:
        config = plugin.peft_config["default"]
        assert isinstance(config, VariatorConfig)  # the command trains no other
        return PluginFacts(
            base=self.model,
            model_class=type(plugin.get_base_model()).__name__,
            name=self.push_to_hub or str(self.output),
            data=", ".join(self.data),
            steps=self.steps,
            held_out=len(data.held_out),
            parameters=count_added_parameters(plugin),
            command=self.command,
            ratios=ratios,
            merged_around=config.merged_around,
        )


def train(job: TrainJob, reporter: Reporter) -> None:
    """Train a plugin and tell what came of it."""
    reporter.check()
    facts, is_first = job.run(reporter)
    if is_first:
        tell_of_run(job, facts, _show, reporter)


def _show(job: TrainJob, facts: PluginFacts, reporter: Reporter) -> None:
    size = decimal((job.output / "adapter_model.safetensors").stat().st_size)
    again = data_words(job.data, job.text_column, job.split)
    again += [] if job.task is None else ["--task", job.task]
    again += ["--ratio", ",".join(str(row.ratio) for row in facts.ratios)]
    lines = [
        f"Wrote {job.output}: the plugin ({facts.parameters:,} parameters, {size}), its model card README.md, "
        "and training.json with the losses.",
        *next_commands(
            ["bench", "--adapter", job.output],
            ["train", facts.base, "--adapter", job.output, *again, "--output", f"{job.output}-on-task"],
        ),
        "The first measures how fast it is; the second trains it further, best on data of a task in place of "
        f"{facts.data}. How to load it: {job.output / 'README.md'}.",
        *_in_sentence_transformers(job),
    ]
    reporter.show_figures(f"Fidelity to {facts.base} on {facts.held_out} held-out examples", facts.rows(), lines)
    if facts.verdict is not None:
        reporter.warn(facts.verdict)


def _in_sentence_transformers(job: TrainJob) -> list[str]:
    name = loading_class(job.output)
    if name is None:
        return []
    lines = (
        "import peft_variator",
        f"from sentence_transformers import {name}",
        f"model = {name}({str(job.output)!r})",
    )
    return ["In Python:", *("  " + line for line in lines)]
