"""Before the first step the trainer chooses a new plugin's neurons by data; the plugin says what it learned for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from peft_variator import DistillationConfig, DistillationTrainer, VariatorConfig, fit_correction
from peft_variator.training import trainer as trainer_module
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import tiny_model


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_model("bert", hidden_size=16, num_attention_heads=2, intermediate_size=32)


def data() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(5, 60, (12,), generator=generator).tolist(), "attention_mask": [1] * 12}
        for _ in range(8)
    ]


def train(model: PeftModel, path: Path, steps: int = 1, dataset: Any = None, **fields: Any) -> None:
    args = DistillationConfig(
        str(path), max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True, **fields
    )
    DistillationTrainer(model, args, train_dataset=dataset or data()).train()


def chosen(model: PeftModel) -> list[list[int]]:
    layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
    return [layer.variator_neurons["default"].index.tolist() for layer in layers]


def test_a_new_plugin_is_calibrated_once(tmp_path: Path) -> None:
    config = VariatorConfig(decompression="neurons", correction_dim=4)
    model = get_peft_model(base(), config)
    without_data = chosen(model)
    train(model, tmp_path / "first")
    by_data = chosen(model)
    assert by_data != without_data
    train(model, tmp_path / "second")
    assert chosen(model) == by_data
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "saved"), is_trainable=True)
    train(loaded, tmp_path / "third")
    assert chosen(loaded) == by_data


@pytest.mark.parametrize("samples", [0, 3])
def test_what_a_new_plugin_writes_is_fitted_before_the_first_step(
    samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[int, Any]] = []

    def fit(model: Any, batches: Any, ratios: Any) -> None:
        batches = list(batches)
        fitted.append((sum(len(batch["input_ids"]) for batch in batches), ratios))
        fit_correction(model, batches, ratios)

    monkeypatch.setattr(trainer_module, "fit_correction", fit)
    model = get_peft_model(base(), VariatorConfig(correction_dim=4))
    train(model, tmp_path / "first", fit_samples=samples, ratios=[2, 4])
    train(model, tmp_path / "second", fit_samples=samples, ratios=[2, 4])
    assert fitted == ([(samples, [2, 4])] if samples else [])
    bottleneck = get_peft_model(base(), VariatorConfig(bottleneck_dim=4, keep_outliers=0.1))
    train(bottleneck, tmp_path / "third", fit_samples=3)
    assert len(fitted) == bool(samples)


class Tokenized(Dataset[dict[str, Any]]):
    """Makes its examples when they are asked for, and notes whether autocast was on."""

    def __init__(self) -> None:
        self.precisions: set[bool] = set()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.precisions.add(torch.is_autocast_enabled("cpu"))
        return data()[index]


def test_examples_are_made_without_autocast(tmp_path: Path) -> None:
    """A feature extractor that computes in the data set would give others, or fail, in bfloat16."""
    dataset = Tokenized()
    model = get_peft_model(base(), VariatorConfig(correction_dim=4))
    train(model, tmp_path / "first", dataset=dataset, bf16=True, fit_samples=2, variance_samples=2)
    assert dataset.precisions == {False}


def test_a_plugin_says_which_ratios_it_was_trained_for(tmp_path: Path) -> None:
    model = get_peft_model(base(), VariatorConfig(compression_ratio=4))
    train(model, tmp_path / "one")
    assert model.peft_config["default"].trained_ratios == [4]
    train(model, tmp_path / "several", ratios=[8, 2])
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "saved"))
    assert loaded.peft_config["default"].trained_ratios == [2, 8]
