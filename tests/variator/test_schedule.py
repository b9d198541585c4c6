"""`ratio_schedule` and `correction_pattern`: how much is merged where, and how wide the corrections are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_variator import VariatorConfig, calibrate, using_ratio
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import BERT, LLAMA

from .reference import first


FIRST, SECOND = "encoder.layer.0.intermediate", "encoder.layer.1.intermediate"
SCHEDULE = {2: {FIRST: 1, SECOND: 4}, 8: {FIRST: 8, SECOND: 16}}


def scheduled(**fields: Any) -> PeftModel:
    fields = {"ratio_schedule": SCHEDULE, "compression_ratio": 2, "init_weights": False} | fields
    base = BERT.build()
    torch.manual_seed(1)
    return get_peft_model(base, VariatorConfig(**fields)).eval()


def patterned(row: dict[str, int]) -> PeftModel:
    base = BERT.build()
    torch.manual_seed(1)
    return get_peft_model(base, VariatorConfig(ratio_pattern=row, init_weights=False)).eval()


def test_a_row_is_what_a_pattern_would_be() -> None:
    inputs, model = BERT.inputs(2, 20), scheduled()
    assert model.compression_ratio == 2
    assert torch.equal(first(model, inputs), first(patterned(SCHEDULE[2]), inputs))
    model.set_compression_ratio(8)
    assert torch.equal(first(model, inputs), first(patterned(SCHEDULE[8]), inputs))
    with using_ratio(model, 2):
        assert torch.equal(first(model, inputs), first(patterned(SCHEDULE[2]), inputs))
    model.set_compression_ratio(1)
    assert torch.equal(first(model, inputs), first(BERT.build(), inputs))


@pytest.mark.parametrize("k", [3, 4, 16])
def test_a_row_that_is_missing(k: int) -> None:
    model = scheduled()
    with pytest.raises(ValueError, match=r"\[2, 8\]"):
        model.set_compression_ratio(k)
    with pytest.raises(ValueError, match=r"\[2, 8\]"), using_ratio(model, k):
        pass
    assert model.compression_ratio == 2


@pytest.mark.parametrize("schedule", [{2: {".*": 1}}, {2: {FIRST: 1, SECOND: 1}, 4: {".*": 1}}])
def test_a_schedule_that_merges_nothing_anywhere(schedule: dict[int, dict[str, int]]) -> None:
    with pytest.raises(ValueError, match=rf"merges nothing: the ratio of '{FIRST}', and of all other targets \(2\)"):
        scheduled(ratio_schedule=schedule)
    with pytest.raises(ValueError, match="Target modules nowhere not found"):
        scheduled(ratio_schedule=schedule, target_modules="nowhere")


def test_saved_and_loaded_with_integers_as_keys(tmp_path: Path) -> None:
    model, inputs = scheduled(), BERT.inputs(2, 20)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ratio_schedule"]["8"] == SCHEDULE[8]
    loaded = PeftModel.from_pretrained(BERT.build(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].ratio_schedule == SCHEDULE
    loaded.set_compression_ratio(8)
    model.set_compression_ratio(8)
    assert torch.equal(first(loaded, inputs), first(model, inputs))


def test_a_module_that_no_row_merges_has_no_plugin(recwarn: pytest.WarningsRecorder) -> None:
    model = scheduled(ratio_schedule={4: {FIRST: 1}}, compression_ratio=4)
    layers = [module.name for module in model.modules() if isinstance(module, VariatorLayer)]
    assert layers == [SECOND]
    assert not [warning for warning in recwarn if "ratio_schedule" in str(warning.message)]


def test_a_module_that_a_row_does_not_name_takes_k() -> None:
    inputs = BERT.inputs(2, 20)
    assert torch.equal(
        first(scheduled(ratio_schedule={4: {"layer.0": 2}}, compression_ratio=4), inputs),
        first(patterned({"layer.0": 2}), inputs),
    )


def test_keys_that_match_nothing() -> None:
    with pytest.warns(UserWarning, match=r"ratio_schedule\[4\].*layer.7"):
        scheduled(ratio_schedule={4: {"layer.7": 2}}, compression_ratio=4)
    with pytest.warns(UserWarning, match=r"correction_pattern.*layer.7"):
        scheduled(correction_pattern={"layer.7": 2})


def test_widths_of_single_modules() -> None:
    model = scheduled(correction_dim=8, correction_pattern={"layer.0": 3, SECOND: 0.5})
    layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
    assert [layer.variator_neuron_into["default"].out_features for layer in layers] == [3, 24]


def test_calibration_reaches_modules_that_only_a_wider_row_merges() -> None:
    model = scheduled(init_weights=True, correction_dim=8)
    calibrate(model, [BERT.inputs(4, 24)])
    layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
    assert all(layer.variator_neurons["default"].is_calibrated for layer in layers)


def test_weights_that_are_tied_to_one_ratio() -> None:
    """`scoring="concat"` serves the rows in which every module has its own ratio, or is left alone."""
    rows = {4: {FIRST: 4, SECOND: 4}, 2: {FIRST: 1, SECOND: 4}, 8: {FIRST: 8, SECOND: 8}}
    model = scheduled(ratio_schedule=rows, compression_ratio=4, scoring="concat")
    model.set_compression_ratio(2)
    with pytest.raises(ValueError, match="concat"):
        model.set_compression_ratio(8)
    model = scheduled(ratio_schedule={4: {"layer": 2}, 2: {"layer": 8}}, compression_ratio=4, scoring="concat")
    with pytest.raises(ValueError, match="concat"):  # though each module was trained for a ratio of 2
        model.set_compression_ratio(2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ratio_schedule": {4: {}}, "ratio_pattern": {"layer.0": 2}}, "ratio_pattern"),
        ({"ratio_schedule": {2: {}}}, "compression_ratio"),
        ({"ratio_schedule": {}}, "compression_ratio"),
        ({"ratio_schedule": {"4": {}}}, "ratio_schedule"),
        ({"ratio_schedule": {1: {}, 4: {}}}, "ratio_schedule"),
        ({"ratio_schedule": {4: {"layer.0": 0}}}, "ratio_schedule"),
        ({"ratio_schedule": {4: {"layer.0": 2.0}}}, "ratio_schedule"),
        ({"ratio_schedule": {4: {"(": 2}}}, "ratio_schedule"),
        ({"ratio_schedule": {4: 2}}, "ratio_schedule"),
        ({"correction_pattern": {"layer.0": 0}}, "correction_pattern"),
        ({"correction_pattern": {"layer.0": 1.5}}, "correction_pattern"),
        ({"correction_pattern": {"layer.0": True}}, "correction_pattern"),
        ({"correction_pattern": {"layer.0": 4}, "decompression": "bottleneck"}, "correction_pattern"),
        ({"correction_dim": 0.5, "decompression": "bottleneck"}, "correction_dim"),
        ({"correction_dim": 32, "bottleneck_dim": 64}, "correction_dim"),
        ({"correction_dim": 32, "bottleneck_dim": 64, "decompression": "neurons"}, "bottleneck_dim"),
        ({"bottleneck_dim": 64, "decompression": "neurons"}, "bottleneck_dim"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VariatorConfig(**fields)


def test_which_decompression_is_meant() -> None:
    assert VariatorConfig().decompression == "neurons"
    assert VariatorConfig(correction_dim=32).decompression == "neurons"
    assert VariatorConfig(bottleneck_dim=32).decompression == "bottleneck"
    for config in (
        VariatorConfig(decompression="bottleneck", correction_dim=32),
        VariatorConfig(bottleneck_dim=32),
        VariatorConfig(bottleneck_dim=32, correction_dim=32),
    ):
        model = get_peft_model(LLAMA.build(), config)
        layer = next(module for module in model.modules() if isinstance(module, VariatorLayer))
        assert layer.variator_up["default"].in_features == 32
    assert VariatorConfig(decompression="bottleneck").bottleneck_dim == 64
    assert VariatorConfig(peft_version="0.21.2").decompression == "bottleneck"
