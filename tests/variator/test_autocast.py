"""Half precision: autocast, a half-precision base with a single-precision plugin, a plugin in the base's precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name, outputs_of


HALF = [torch.bfloat16, torch.float16]


def with_plugin(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(case.build().to(dtype), VariatorConfig(init_weights=False), **options)
    return model.eval()


def inputs_of(case: Case, uneven: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = case.inputs(2, 12)
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, inputs["input_ids"].shape[1] - 4 :] = int(not uneven)
        inputs["attention_mask"] = mask
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [case for case in ALL if case.name != "deberta"], ids=by_name)  # whose base raises
def test_autocast_is_close_to_single_precision(case: Case, dtype: torch.dtype, uneven: bool) -> None:
    model, inputs = with_plugin(case), inputs_of(case, uneven)
    expected = outputs_of(model, inputs)
    with torch.autocast("cpu", dtype):
        found = outputs_of(model, inputs)
        with model.disable_adapter():
            base = outputs_of(model, inputs)
    for name, value in expected.items():
        # Routers of experts choose otherwise after rounding: their outputs are compared for being finite alone.
        assert found[name].dtype == base[name].dtype
        assert torch.isfinite(found[name]).all()
        if "mixtral" not in case.name and "moe" not in case.name:
            assert relative_error(found[name], value) < 0.15


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_training_under_autocast(case: Case, dtype: torch.dtype) -> None:
    model, inputs = with_plugin(case).train(), inputs_of(case, True)
    with torch.autocast("cpu", dtype):
        next(iter(model(**inputs).values())).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if "variator_" in name:
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.any()


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_half_precision_base(case: Case, dtype: torch.dtype, autocast_adapter_dtype: bool, uneven: bool) -> None:
    model = with_plugin(case, dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    plugin_dtype = torch.float32 if autocast_adapter_dtype else dtype
    for module in model.modules():
        if isinstance(module, VariatorLayer):
            assert {parameter.dtype for parameter in module.variator_scorer.parameters()} == {plugin_dtype}
    found = outputs_of(model, inputs_of(case, uneven, dtype))
    with model.disable_adapter():
        base = outputs_of(model, inputs_of(case, uneven, dtype))
    for name, value in found.items():
        assert value.dtype == base[name].dtype
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_half_precision_base_trains_a_single_precision_plugin(case: Case) -> None:
    model, inputs = with_plugin(case, torch.bfloat16).train(), inputs_of(case, True)
    next(iter(model(**inputs).values())).float().square().mean().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "variator_" in name]
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


def test_a_plugin_follows_its_model_to_another_precision() -> None:
    model, inputs = with_plugin(BERT), inputs_of(BERT, True)
    expected = outputs_of(model, inputs)["last_hidden_state"]
    found = outputs_of(model.to(torch.bfloat16), inputs)["last_hidden_state"]
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 0.1
