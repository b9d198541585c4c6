"""`.forward` and `__call__` are the same; the wrapped forward looks like the original and goes without a trace."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_variator import VariatorConfig, shrink_plugin
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name

from .reference import with_plugin


T5 = next(case for case in ALL if case.name == "t5")


def first(output: Any) -> torch.Tensor:
    return next(iter(output.values())).detach()


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_forward_is_call(case: Case) -> None:
    model, inputs = with_plugin(case).get_base_model(), case.inputs(2, 12)
    with torch.no_grad():
        expected = first(model(**inputs))
        assert torch.equal(first(model.forward(**inputs)), expected)
        assert not torch.equal(first(case.build()(**inputs)), expected)


@pytest.mark.parametrize("case", [BERT, LLAMA, T5], ids=by_name)
def test_the_signature_is_the_original_s(case: Case) -> None:
    base, model = case.build(), with_plugin(case).get_base_model()
    wrapped = [module for module in model.modules() if "forward" in vars(module)]
    assert wrapped
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    for module in wrapped:
        own = type(module).forward.__get__(module)
        assert inspect.signature(module.forward) == inspect.signature(own)


@pytest.mark.parametrize("fields", [{}, {"correction_rank": 2}, {"correction_bits": 4}], ids=str)
@pytest.mark.parametrize("case", [BERT, LLAMA, T5], ids=by_name)
def test_copies_and_pickles_call_themselves(case: Case, fields: dict[str, int]) -> None:
    """A pool of processes pickles the model, too; those that read the base's rows know them by weak references."""
    bits = fields.get("correction_bits")
    model, inputs = with_plugin(case, **({} if bits else fields)), case.inputs(2, 12)
    if bits:
        shrink_plugin(model, bits=bits)
    with torch.no_grad():
        expected = first(model(**inputs))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            model.set_compression_ratio(1)
            assert torch.equal(first(other(**inputs)), expected)
            assert torch.equal(first(other.get_base_model().forward(**inputs)), expected)
            other.set_compression_ratio(1)
            assert torch.equal(first(other(**inputs)), first(case.build()(**inputs)))
            model.set_compression_ratio(4)


def test_a_loss_needs_no_call_of_the_module_itself() -> None:
    model = with_plugin(BERT).train()
    first_loss = model.get_base_model().forward(**BERT.inputs(2, 12)).last_hidden_state.square().mean()
    first_loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "variator_" in name)


def test_deleting_the_last_plugin_by_transformers_leaves_no_trace() -> None:
    base = BERT.build()
    base.add_adapter(VariatorConfig(), adapter_name="one")
    base.add_adapter(VariatorConfig(), adapter_name="two")
    base.delete_adapter("one")
    assert "forward" in vars(base)
    base.delete_adapter("two")
    assert [name for name, module in base.named_modules() if "forward" in vars(module)] == []
    base.add_adapter(VariatorConfig(init_weights=False), adapter_name="three")
    base.set_adapter("three")
    assert not torch.equal(first(base(**BERT.inputs(2, 12))), first(BERT.build()(**BERT.inputs(2, 12))))


BROKEN = [
    ({"adapter_name": "with.dot"}, {}),
    ({}, {"end_module": "output.nowhere", "target_modules": ["intermediate"]}),
    ({}, {"stack_module": "nowhere"}),
    ({}, {"target_modules": ["nowhere"]}),
]


@pytest.mark.parametrize(("arguments", "fields"), BROKEN, ids=str)
def test_a_plugin_that_fails_leaves_the_model_as_it_was(arguments: dict[str, Any], fields: dict[str, Any]) -> None:
    base = BERT.build()
    names = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match="."):
        get_peft_model(base, VariatorConfig(**fields), **arguments)
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    assert all("forward" not in vars(module) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert torch.equal(first(base(**BERT.inputs())), first(BERT.build()(**BERT.inputs())))


def test_a_second_plugin_that_fails_leaves_the_first() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    expected = first(model(**inputs))
    for fields in ({"end_module": "nowhere", "target_modules": ["intermediate"]}, {"target_modules": ["nowhere"]}):
        with pytest.raises(ValueError, match="nowhere"):
            model.add_adapter("second", VariatorConfig(**fields))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(first(model(**inputs)), expected)
    model.add_adapter("second", VariatorConfig())


class LateFailure(nn.Module):
    """A model whose second network has no end: only the last layer can't take a plugin."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"start": nn.Linear(8, 8), "end": nn.Linear(8, 8)}) for _ in range(2)]
        del layers[1]["end"]
        self.layers = nn.ModuleList(layers)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_failure_in_the_last_layer_leaves_the_first_ones_alone() -> None:
    model = LateFailure()
    with pytest.raises(ValueError, match="end_module='end'"):
        get_peft_model(model, VariatorConfig(target_modules=["start"], end_module="end"))
    assert not any(isinstance(module, VariatorLayer) for module in model.modules())


def test_ratio_patterns() -> None:
    model = get_peft_model(BERT.build(), VariatorConfig(ratio_pattern={"layer.0": 1}))
    rules = [module.rules["default"].ratio for module in model.modules() if isinstance(module, VariatorLayer)]
    assert rules == [1, 4]
    with pytest.warns(UserWarning, match=r"\['layer.7', 'elsewhere'\]"):
        get_peft_model(BERT.build(), VariatorConfig(ratio_pattern={"layer.7": 1, "elsewhere": 2, "layer.1": 2}))
