"""What the tests of training have in common; see `training_cases`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import Tensor
from training_cases import build_base, build_plugin, collate_batch, make_examples
from transformers import PreTrainedModel

from peft_variator.training import DistillationConfig


@pytest.fixture
def base_model() -> Callable[[str], PreTrainedModel]:
    """Builds the base model of a name."""
    return build_base


@pytest.fixture
def plugin_model() -> Callable[..., PeftModel]:
    """Builds a base model with a Variator plugin."""
    return build_plugin


@pytest.fixture
def examples() -> Callable[..., list[dict[str, Any]]]:
    """Makes random examples for a model."""
    return make_examples


@pytest.fixture
def collate() -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Pads the examples of a batch to the longest."""
    return collate_batch


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., DistillationConfig]:
    """Makes training arguments for a short quiet run on the CPU."""

    def make(**fields: Any) -> DistillationConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return DistillationConfig(**{**defaults, **fields})

    return make
