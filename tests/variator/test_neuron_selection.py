"""What `calibrate` and `fit_correction` refuse and leave as it was, and at which ratios they look at the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_variator import VariatorConfig, allocate, calibrate, fit_correction, set_compression_ratio, using_ratio
from peft_variator.training import DistillationConfig, DistillationTrainer
from peft_variator.tuners.variator.correction_fit import needs_fit
from peft_variator.tuners.variator.neuron_selection import needs_calibration
from tests.tiny_models import BERT, LLAMA

from .reference import layers_of


def with_neurons(case: Any = BERT, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(**{"correction_dim": 8, **fields}))


def batches(case: Any = BERT) -> list[dict[str, Tensor]]:
    return [case.inputs(3, 23, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("function", [calibrate, fit_correction, allocate])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.ones(2, 9, dtype=torch.long).numpy(), "a NumPy array as 'attention_mask'"),
        ([[1] * 9, [1] * 9], "a list of int as 'attention_mask'"),
        (list(torch.ones(2, 9, dtype=torch.long).numpy()), "a list of ndarray as 'attention_mask'"),
    ],
    ids=["array", "list", "list of arrays"],
)
def test_what_is_no_tensor_is_named(function: Any, value: Any, named: str) -> None:
    model = BERT.build() if function is allocate else with_neurons()
    batch = BERT.inputs(2, 9) | {"attention_mask": value}
    with pytest.raises(TypeError, match=rf"{named}.*return_tensors='pt'.*torch\.as_tensor"):
        function(model, [batch])


def chosen(model: PeftModel) -> list[list[int]]:
    return [layer.modules_of("default")["variator_neurons"].index.tolist() for layer in layers_of(model)]


def written(model: PeftModel) -> list[Tensor]:
    return [layer.modules_of("default")["variator_neuron_out"].weight.detach().clone() for layer in layers_of(model)]


def trainer_of(model: PeftModel, folder: Path, **arguments: Any) -> DistillationTrainer:
    examples = [{"input_ids": row} for batch in batches() for row in batch["input_ids"]]
    args = DistillationConfig(str(folder), use_cpu=True, report_to="none", max_steps=1, fit_samples=12, **arguments)
    return DistillationTrainer(model, args, train_dataset=examples)


@pytest.mark.parametrize("row", [2, 8])
def test_the_row_of_a_schedule_that_is_chosen_counts(row: int) -> None:
    plain, scheduled = (
        with_neurons(compression_ratio=row),
        with_neurons(compression_ratio=row, ratio_schedule={2: {}, 8: {}}),
    )
    for model in (plain, scheduled):
        calibrate(model, batches())
        fit_correction(model, batches())
    assert chosen(plain) == chosen(scheduled)
    for one, other in zip(written(plain), written(scheduled), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "fields", [{"compression_ratio": 4}, {"compression_ratio": 1}, {"ratio_pattern": {"layer.0": 1}}]
)
def test_a_trainer_learns_at_the_ratios_it_trains_whatever_is_chosen(fields: dict[str, Any], tmp_path: Path) -> None:
    model = with_neurons(**fields)
    if fields.get("compression_ratio") == 4:
        set_compression_ratio(model, 1)  # somebody looked at the base
    before = written(model)
    trainer_of(model, tmp_path, ratios=[2, 4]).calibrate()
    for layer, start in zip(layers_of(model), before, strict=True):
        modules = layer.modules_of("default")
        assert modules["variator_neurons"].is_calibrated
        assert not torch.equal(modules["variator_neuron_out"].weight, start)


def test_modules_keep_the_modes_they_had() -> None:
    model = with_neurons().train()
    model.get_base_model().encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    calibrate(model, batches())
    fit_correction(model, batches())
    assert [module.training for module in model.modules()] == before


def test_a_network_that_writes_nothing_keeps_its_neurons() -> None:
    """A block that was put in as the identity, to be trained later."""
    base = LLAMA.build()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.zero_()
    model = get_peft_model(base, VariatorConfig(correction_dim=8))
    before = chosen(model)
    calibrate(model, batches(LLAMA))
    fit_correction(model, batches(LLAMA))
    assert chosen(model)[1] == before[1]
    assert not needs_calibration(model)


def test_values_that_are_not_finite_choose_no_neurons() -> None:
    """In any network: each sees what the one before gives."""
    model, outliers = with_neurons(), with_neurons(keep_outliers=0.2)
    before, texts = chosen(model), batches()
    for each in (model, outliers):
        with torch.no_grad():
            each.get_input_embeddings().weight[texts[0]["input_ids"][0, 3]] = torch.nan
    with pytest.warns(UserWarning, match="not finite .* which neurons to copy there stays as it is"):
        calibrate(model, texts)
    assert chosen(model) == before
    assert needs_calibration(model)
    with pytest.raises(ValueError, match="not finite .* no probe for keep_outliers"):
        calibrate(outliers, texts)


def test_a_plugin_that_was_fitted_is_trained_as_it_is(tmp_path: Path) -> None:
    """Also where one of its networks had nothing to fit, and so looks new."""
    model = with_neurons(correction_pattern={"layer.0": layers_of(with_neurons())[0].network().width})
    fit_correction(model, batches())
    assert not needs_calibration(model)
    trainer_of(model, tmp_path).train()


def test_a_fitted_plugin_is_refused_at_every_ratio() -> None:
    model = with_neurons(keep_outliers=0.2)
    calibrate(model, batches())
    fit_correction(model, batches())
    for ratio in (4, 1):
        set_compression_ratio(model, ratio)
        with pytest.raises(ValueError, match="has been trained or fitted"):
            calibrate(model, batches())


@pytest.mark.parametrize("part", ["variator_scorer", "variator_compensation_B"])
@pytest.mark.parametrize("learn", [calibrate, fit_correction])
def test_a_plugin_of_which_anything_was_trained_is_refused(learn: Any, part: str) -> None:
    """Also where its copies are still the base's; a trainer then trains it as it is."""
    model = with_neurons(compensation_rank=2)
    assert needs_calibration(model)
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if part in name).add_(0.1)
    with pytest.raises(ValueError, match="has been trained or fitted"):
        learn(model, batches())
    assert not needs_calibration(model)


@pytest.mark.parametrize("learn", [calibrate, fit_correction])
def test_inside_of_a_block_it_is_refused(learn: Any) -> None:
    model = with_neurons()
    before = chosen(model), written(model)
    with using_ratio(model, 8), pytest.raises(ValueError, match="inside of a using_ratio block"):
        learn(model, batches())
    assert chosen(model) == before[0]
    assert all(torch.equal(one, other) for one, other in zip(written(model), before[1], strict=True))


@pytest.mark.parametrize("learn", [calibrate, fit_correction])
@pytest.mark.parametrize(
    ("ratios", "error", "told"),
    [
        (4, TypeError, r"ratios=4 has to be a list"),
        ([], ValueError, r"ratios=\[\] names none"),
        ([1], ValueError, r"a ratio=1 has to be an integer of at least 2"),
    ],
)
def test_ratios_that_are_none(learn: Any, ratios: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        learn(with_neurons(), batches(), ratios)


def test_a_plugin_that_merges_nothing_is_not_trained(tmp_path: Path) -> None:
    model = with_neurons(compression_ratio=1)
    with pytest.raises(ValueError, match="merges nothing at compression_ratio=1"):
        trainer_of(model, tmp_path).train()
    assert needs_fit(model, [2])
    trainer_of(model, tmp_path, ratios=[2, 4]).train()


def test_a_training_that_did_not_begin_is_not_noted(tmp_path: Path) -> None:
    model = with_neurons()
    trainer = trainer_of(model, tmp_path)
    trainer.calibrate()

    def broken(examples: list[Any]) -> dict[str, Tensor]:
        raise KeyError("a column that is not there")

    trainer.data_collator = broken
    with pytest.raises(KeyError, match="a column"):
        trainer.train()
    assert model.peft_config["default"].trained_ratios is None
