"""What every run that trains an adapter goes through: the model, the data, the trainer's arguments, the result."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel

from ..files import new_folder, write_text
from ..models import Task
from ..profiling import build_model, count_positions, load_config
from ..training import DistillationConfig
from ..training.card import PluginFacts
from ..training.restored_card import RestoredFacts
from .run_settings import RunSettings
from .train_data import TrainingData, load_data


__all__ = ["load_run_data", "load_weights", "training_arguments", "write_adapter"]


def load_weights(name: str, task: Task) -> PreTrainedModel:
    """A model with its trained weights, in single precision on the CPU; the trainer takes it where it runs."""
    cpu = torch.device("cpu")
    return build_model(name, load_config(name), task, dtype=torch.float32, device=cpu, random_weights=False)


def load_run_data(settings: RunSettings, task: Task) -> TrainingData:
    """As much data as all processes of the run need; see [`load_data`].

    Raises:
        ValueError: examples would be longer than the model can read.
    """
    _check_length(settings)
    batch = settings.batch_size * settings.accumulation * _processes()
    return load_data(
        settings.model,
        task,
        settings.data,
        column=settings.text_column,
        split=settings.split,
        max_length=settings.max_length,
        wanted=settings.steps * batch + settings.held_out,
        held_out=settings.held_out,
        seed=settings.seed,
    )


@contextmanager
def training_arguments(settings: RunSettings, **objective: Any) -> Iterator[DistillationConfig]:
    """The trainer's arguments; what it writes goes to the folder for checkpoints, or to one that goes away.

    Args:
        settings: settings of the run.
        objective: what is trained for, further fields of `DistillationConfig`.
    """
    on_cpu = not torch.accelerator.is_available()
    with tempfile.TemporaryDirectory(prefix=f"peft-variator-{settings.subcommand}-") as scratch:
        yield DistillationConfig(
            output_dir=str(settings.checkpoints or scratch),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.lr,
            bf16=settings.bf16,
            seed=settings.seed,
            logging_steps=max(1, settings.steps // 20),
            save_strategy="no" if settings.checkpoints is None else "steps",
            save_steps=max(1, settings.steps // 10),
            dataloader_pin_memory=not on_cpu,
            # Without these, several processes on the CPU would each train for themselves.
            use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and _processes() > 1 else None,
            **objective,
        )


def write_adapter(
    output: Path, model: PeftModel, card: ModelCard, facts: PluginFacts | RestoredFacts, log: list[dict[str, Any]]
) -> None:
    """Write an adapter, its card, and `training.json` with the facts and the log: all of it or nothing."""
    with new_folder(output) as folder:
        model.save_pretrained(str(folder))
        card.save(folder / "README.md")
        write_text(folder / "training.json", json.dumps({"facts": asdict(facts), "log": log}, indent=2) + "\n")


def _processes() -> int:
    """Number of processes that `accelerate launch` or `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_length(settings: RunSettings) -> None:
    positions = count_positions(load_config(settings.model))  # of images none, and of relative ones
    if positions is not None and settings.max_length > positions:
        raise ValueError(
            f"--max-length is {settings.max_length}, but {settings.model} has {positions} positions. Lower it."
        )
