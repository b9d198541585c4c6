"""What `peft-variator train` does: data, plugin, training, measuring, writing."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..files import check_new_folder, new_folder, write_text
from ..profiling import SHAPES, build_model, count_flops, find_task, load_config
from ..profiling.shapes import Task
from ..training import DistillationConfig, DistillationTrainer, load_plugin
from ..training.card import PluginFacts, RatioFacts, plugin_card
from ..training.quality import measure_quality
from ..tuners.variator import VariatorConfig
from .train_data import TrainingData, load_data


__all__ = ["TrainJob"]

# Hidden states are followed in any case; a causal language model is judged by its predictions, too.
LOGITS_WEIGHTS: dict[Task, float] = {"causal": 1.0, "seq2seq": 0.0, "encoder": 0.0, "vision": 0.0}


@dataclass
class TrainJob:
    """Settings of a training run; each is an option of the command.

    Raises:
        ValueError: a setting is out of range, or the model has no pretrained weights.
        FileExistsError: the output folder exists and is not empty.
    """

    model: str
    data: str
    output: Path
    ratio: list[int] | None = None
    adapter: str | None = None
    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    lr: float = 2e-3
    max_length: int = 128
    hidden_loss: str = "all"
    logits_weight: float | None = None
    bottleneck_dim: int | None = None
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
        if self.model in SHAPES or Path(self.model).suffix == ".json":
            raise ValueError(
                f"{self.model} is a configuration without trained weights, which there is no use in following. Name a "
                "model on the Hub or a folder with one."
            )
        if self.adapter is not None and self.bottleneck_dim is not None:
            raise ValueError("--bottleneck-dim is that of the plugin in --adapter. Leave one of them out.")
        check_new_folder(self.output)

    @property
    def command(self) -> str:
        """The command line of these settings: what differs from the defaults."""
        words = ["peft-variator", "train", self.model]
        for option in fields(self)[1:]:
            value, name = getattr(self, option.name), "--" + option.name.replace("_", "-")
            if option.default is not MISSING and value == option.default:
                continue
            if value is True:
                words.append(name)
            else:
                for each in value if isinstance(value, list) else [value]:
                    words += [name, str(each)]
        return shlex.join(words)

    def run(self) -> tuple[PluginFacts, bool]:
        """Train a plugin and write it with its card.

        Returns:
            tuple[PluginFacts, bool]: what is known about the plugin, and whether this is the process that wrote it.
        """
        config = load_config(self.model)
        task = self.task or find_task(self.model, config)
        self._check_length(config)
        data = self._load_data(task)
        set_seed(self.seed)
        cpu = torch.device("cpu")
        base = build_model(self.model, config, task, dtype=torch.float32, device=cpu, random_weights=False)
        plugin, ratios = self._plugin(base, data)
        with self._trainer(plugin, task, ratios, data) as trainer:
            before = self._qualities(plugin, ratios, data)
            trainer.train(resume_from_checkpoint=self._last_checkpoint())
            after = self._qualities(plugin, ratios, data)
            flops = self._flops(plugin, task, [1, *ratios], data)
            rows = [RatioFacts(k, flops[1], flops[k], before[k], after[k]) for k in ratios]
            facts = self._facts(plugin, data, rows)
            is_first = trainer.is_world_process_zero()
            if is_first:
                self._write(plugin, facts, trainer.state.log_history)
        return facts, is_first

    def _check_length(self, config: PreTrainedConfig) -> None:
        # Models with relative positions have no such field, and images no text.
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and self.max_length > positions:
            raise ValueError(
                f"--max-length is {self.max_length}, but {self.model} has {positions} positions. Lower it."
            )

    def _load_data(self, task: Task) -> TrainingData:
        return load_data(
            self.model,
            task,
            self.data,
            column=self.text_column,
            split=self.split,
            max_length=self.max_length,
            wanted=self.steps * self.batch_size * self.accumulation * _processes() + self.held_out,
            held_out=self.held_out,
            seed=self.seed,
        )

    def _plugin(self, base: PreTrainedModel, data: TrainingData) -> tuple[PeftModel, list[int]]:
        """The base with the plugin to train, and the ratios to train it for, the first of which it gets."""
        if self.adapter is not None:
            plugin = load_plugin(base, self.adapter)
            config = plugin.peft_config["default"]
            if not isinstance(config, VariatorConfig):
                raise ValueError(
                    f"--adapter {self.adapter} has the method {config.peft_type!s}, not a Variator plugin."
                )
            if self.ratio is None:
                return plugin, [config.compression_ratio]
            config.compression_ratio, config.ratio_pattern = self.ratio[0], {}
            plugin.set_compression_ratio(self.ratio[0])
            return plugin, self.ratio
        ratios = self.ratio or [VariatorConfig().compression_ratio]
        options: dict[str, Any] = {"compression_ratio": ratios[0]}
        if self.bottleneck_dim is not None:
            options["bottleneck_dim"] = self.bottleneck_dim
        if data.tokenizer is None:
            return get_peft_model(base, VariatorConfig(**options)), ratios
        return get_peft_model(base, VariatorConfig.from_tokenizer(data.tokenizer, **options)), ratios

    @contextmanager
    def _trainer(
        self, plugin: PeftModel, task: Task, ratios: list[int], data: TrainingData
    ) -> Iterator[DistillationTrainer]:
        on_cpu = not torch.accelerator.is_available()
        with tempfile.TemporaryDirectory(prefix="peft-variator-train-") as scratch:
            args = DistillationConfig(
                output_dir=str(self.checkpoints or scratch),
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=self.batch_size,
                gradient_accumulation_steps=self.accumulation,
                learning_rate=self.lr,
                hidden_loss=self.hidden_loss,
                logits_weight=LOGITS_WEIGHTS[task] if self.logits_weight is None else self.logits_weight,
                ratios=ratios if len(ratios) > 1 else None,
                bf16=self.bf16,
                seed=self.seed,
                logging_steps=max(1, self.steps // 20),
                save_strategy="no" if self.checkpoints is None else "steps",
                save_steps=max(1, self.steps // 10),
                dataloader_pin_memory=not on_cpu,
                # Without these, several processes on the CPU would each train for themselves.
                use_cpu=on_cpu,
                ddp_backend="gloo" if on_cpu and _processes() > 1 else None,
            )
            yield DistillationTrainer(plugin, args, train_dataset=data.train, data_collator=data.collate)

    def _last_checkpoint(self) -> str | None:
        exists = self.checkpoints is not None and self.checkpoints.is_dir()
        return get_last_checkpoint(str(self.checkpoints)) if exists else None

    def _qualities(self, plugin: PeftModel, ratios: list[int], data: TrainingData) -> dict[int, dict[str, float]]:
        qualities = {}
        for ratio in ratios:
            plugin.set_compression_ratio(ratio)
            qualities[ratio] = measure_quality(plugin, data.held_out_batches(self.batch_size, plugin.device))
        plugin.set_compression_ratio(ratios[0])
        return qualities

    def _flops(self, plugin: PeftModel, task: Task, ratios: list[int], data: TrainingData) -> dict[int, int]:
        """Operations of one held-out batch at each ratio: of a causal model the prefill, as `generate` runs it."""
        inputs = next(data.held_out_batches(self.batch_size, plugin.device))
        if task == "causal":
            del inputs["labels"]
            inputs |= {"use_cache": True, "logits_to_keep": 1}
        counted = {}
        for ratio in ratios:
            plugin.set_compression_ratio(ratio)
            counted[ratio] = count_flops(plugin.eval(), inputs)
        return counted

    def _facts(self, plugin: PeftModel, data: TrainingData, ratios: list[RatioFacts]) -> PluginFacts:
        return PluginFacts(
            base=self.model,
            model_class=type(plugin.get_base_model()).__name__,
            name=str(self.output),
            data=self.data,
            steps=self.steps,
            held_out=len(data.held_out),
            parameters=sum(value.numel() for value in plugin.parameters() if value.requires_grad),
            command=self.command,
            ratios=ratios,
        )

    def _write(self, plugin: PeftModel, facts: PluginFacts, log: list[dict[str, Any]]) -> None:
        with new_folder(self.output) as folder:
            plugin.save_pretrained(str(folder))
            plugin_card(facts).save(folder / "README.md")
            write_text(folder / "training.json", json.dumps({"facts": asdict(facts), "log": log}, indent=2) + "\n")


def _processes() -> int:
    """Number of processes that `accelerate launch` or `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
