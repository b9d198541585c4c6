"""Ratio 1 and a disabled plugin are the base model; a new plugin is mean pooling."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name, outputs_of

from .reference import watch


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=0, equal_nan=True)


def base_outputs(case: Case) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    # Frozen, as under an adapter: torch's nn.MultiheadAttention takes another kernel for frozen weights.
    model = case.build().requires_grad_(False)
    return model, outputs_of(model, case.inputs())


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_ratio_1_is_the_base_model(case: Case) -> None:
    model, expected = base_outputs(case)
    model = get_peft_model(model, VariatorConfig(compression_ratio=1, init_weights=False))
    assert_same_bits(outputs_of(model, case.inputs()), expected)


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_default_configuration_merges_and_disabling_gives_the_base_model_back(case: Case) -> None:
    model, expected = base_outputs(case)
    model = get_peft_model(model, VariatorConfig())
    merged = outputs_of(model, case.inputs())
    assert any((merged[name] - expected[name]).abs().max() > 1e-3 for name in expected)
    with model.disable_adapter():
        assert_same_bits(outputs_of(model, case.inputs()), expected)
    assert_same_bits(outputs_of(model, case.inputs()), merged)


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_ratio_1_at_run_time_is_the_base_model(case: Case) -> None:
    model, expected = base_outputs(case)
    model = get_peft_model(model, VariatorConfig(init_weights=False))
    model.set_compression_ratio(1)
    assert_same_bits(outputs_of(model, case.inputs()), expected)
    model.set_compression_ratio(3)
    merged = outputs_of(model, case.inputs())
    assert any((merged[name] - expected[name]).abs().max() > 1e-3 for name in expected)


@pytest.mark.parametrize("scoring", ["token", "concat"])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_untrained_plugin_is_mean_pooling(case: Case, scoring: str) -> None:
    model = get_peft_model(
        case.build(), VariatorConfig(compression_ratio=3, scoring=scoring, decompression="bottleneck")
    )
    inputs = case.inputs(batch=1, length=8)  # 0 | 1 2 3 | 4 5 6 | 7
    with torch.no_grad():
        for seen in watch(model, lambda: model(**inputs)):
            assert seen.rows == 4
            for group in ((0,), (1, 2, 3), (4, 5, 6), (7,)):
                pooled = seen.inputs[:, list(group)].mean(1, keepdim=True)
                expected = seen.layer.base_layer(pooled) if case is LLAMA else None
                for position in group:
                    output = seen.outputs[:, position : position + 1]
                    torch.testing.assert_close(output, seen.outputs[:, group[0] : group[0] + 1], rtol=0, atol=0)
                    if expected is not None:
                        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_new_plugin_scores_and_corrects_with_zeros() -> None:
    model = get_peft_model(BERT.build(), VariatorConfig(decompression="bottleneck"))
    for layer in model.modules():
        if isinstance(layer, VariatorLayer):
            assert not layer.variator_scorer["default"].weight.any()
            assert not layer.variator_up["default"].weight.any()
            assert layer.variator_down_input["default"].weight.any()
