"""Fields of the training arguments, and the draw of ratios."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from peft_variator.training import DistillationConfig
from peft_variator.training.trainer import sample_ratio


def test_only_three_defaults_of_training_arguments_change() -> None:
    ours = {field.name: field for field in fields(DistillationConfig)}
    changed = {
        field.name: ours[field.name].default
        for field in fields(TrainingArguments)
        if ours[field.name].default != field.default and field.default is not MISSING
    }
    assert changed == {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss_k4", False),
        ("eval_hidden_loss_k16", False),
        ("loss", False),
        ("agreement_k4", True),
        ("agreement", True),
    ],
)
def test_losses_at_a_ratio_are_to_be_low(metric: str, greater: bool, tmp_path: Path) -> None:
    fields = {"metric_for_best_model": metric, "output_dir": str(tmp_path), "use_cpu": True}
    assert DistillationConfig(**fields).greater_is_better is greater
    assert DistillationConfig(**fields, greater_is_better=True).greater_is_better


def test_noise_on_embeddings_needs_a_base_in_training_mode(tmp_path: Path) -> None:
    fields = {"output_dir": str(tmp_path), "use_cpu": True, "neftune_noise_alpha": 5.0}
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5.0 .*base_dropout=True"):
        DistillationConfig(**fields)
    assert DistillationConfig(**fields, base_dropout=True).neftune_noise_alpha == 5.0


def test_every_field_has_a_help() -> None:
    own = {field.name for field in fields(DistillationConfig)} - {field.name for field in fields(TrainingArguments)}
    assert own == {
        "base_dropout",
        "embedding_pooling",
        "embedding_weight",
        "fit_samples",
        "hidden_loss",
        "hidden_weight",
        "logits_weight",
        "ratios",
        "task_weight",
        "temperature",
        "variance_samples",
    }
    assert all(field.metadata["help"] for field in fields(DistillationConfig) if field.name in own)


def test_fields_are_read_from_a_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--ratios", "2", "4", "--hidden_loss", "last", "--logits_weight", "0.5"]
    (config,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(words)
    assert (config.ratios, config.hidden_loss, config.logits_weight) == ([2, 4], "last", 0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_weight": -1.0}, r"hidden_weight=-1.0 has to be a number, 0 or greater"),
        ({"logits_weight": -0.1}, r"logits_weight=-0.1 has to be a number, 0 or greater"),
        ({"hidden_weight": 0.0}, r"hidden_weight, logits_weight, task_weight, embedding_weight are all 0"),
        ({"hidden_loss": "first"}, r"hidden_loss='first' is not one of 'last', 'all'"),
        ({"embedding_weight": -2.0}, r"embedding_weight=-2.0 has to be a number, 0 or greater"),
        ({"embedding_pooling": "sum"}, r"embedding_pooling='sum'.*mean, cls"),
        ({"task_weight": float("nan")}, r"task_weight=nan has to be a finite number"),
        ({"hidden_weight": "1"}, r"hidden_weight='1' has to be a number"),
        ({"temperature": 0.0}, r"temperature=0.0 has to be a number greater than 0"),
        ({"temperature": float("inf")}, r"temperature=inf has to be a finite number"),
        ({"variance_samples": 0}, r"variance_samples=0 has to be an integer of at least 1"),
        ({"fit_samples": -1}, r"fit_samples=-1 has to be an integer of at least 0"),
        ({"variance_samples": 1.5}, r"variance_samples=1.5 has to be an integer"),
        ({"ratios": 4}, r"ratios=4 has to be None or a list"),
        ({"ratios": []}, r"ratios=\[\] holds nothing to draw from"),
        ({"ratios": [4, 1]}, r"ratios=\[4, 1\] holds 1; every ratio has to be an integer of at least 2"),
        ({"ratios": [2.5]}, r"ratios\[0\]=2.5 has to be an integer"),
        ({"ratios": [True]}, r"ratios\[0\]=True has to be an integer"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir=str(tmp_path), **wrong)


def test_ratios_are_drawn_from_seed_and_step_alone() -> None:
    drawn = [sample_ratio([2, 4, 8], 7, step) for step in range(300)]
    assert drawn == [sample_ratio([2, 4, 8], 7, step) for step in range(300)]
    assert drawn != [sample_ratio([2, 4, 8], 8, step) for step in range(300)]
    counts = Counter(drawn)
    assert set(counts) == {2, 4, 8}
    assert min(counts.values()) > 70


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup", [0, 0.1, 1, 5])
def test_a_rate_above_0_follows_the_warm_up(tmp_path, steps: int, warmup: float) -> None:
    args = DistillationConfig(output_dir=str(tmp_path), warmup_steps=warmup, use_cpu=True)
    wanted = warmup if warmup >= 1 else math.ceil(warmup * steps)
    assert args.get_warmup_steps(steps) == min(wanted, steps - 1)
