"""Gradient checkpointing computes a layer again in the backward: with the groups of its own call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name


MODES = [{"use_reentrant": False}, {"use_reentrant": True}]


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    base = case.build()
    if not base.supports_gradient_checkpointing:
        pytest.skip(f"{case.name} has no gradient checkpointing")
    torch.manual_seed(1)
    return get_peft_model(base, VariatorConfig(init_weights=False, **fields)).train()


def inputs_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    inputs = case.inputs(2, 12, seed)
    if "input_ids" in inputs:
        mask = torch.ones_like(inputs["input_ids"])
        mask[seed % 2, 5 + seed :] = 0
        inputs["attention_mask"] = mask
    return inputs


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return sum(value.square().mean() for value in output.values() if isinstance(value, Tensor) and value.requires_grad)


def gradients(model: PeftModel, calls: list[dict[str, Tensor]], then: Any = None) -> dict[str, Tensor]:
    """Gradients of the plugin after all calls were made forward, then backward."""
    model.zero_grad()
    torch.manual_seed(0)
    losses = [loss_of(model, inputs) for inputs in calls]
    if then is not None:
        then()
    sum(losses).backward()
    found = {name: p.grad for name, p in model.named_parameters() if "variator_" in name and p.grad is not None}
    assert found
    return {name: gradient.clone() for name, gradient in found.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_same_gradients_as_without(case: Case, mode: dict[str, bool]) -> None:
    model, calls = with_plugin(case), [inputs_of(case)]
    expected = gradients(model, calls)
    model.get_base_model().gradient_checkpointing_enable(mode)
    model.enable_input_require_grads()
    assert_equal(gradients(model, calls), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_two_forwards_before_one_backward(case: Case, mode: dict[str, bool]) -> None:
    model, calls = with_plugin(case), [inputs_of(case, 0), inputs_of(case, 3)]
    expected = gradients(model, calls)
    model.get_base_model().gradient_checkpointing_enable(mode)
    model.enable_input_require_grads()
    assert_equal(gradients(model, calls), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("between", ["generation", "disabled", "failure", "evaluation"])
def test_another_call_between_forward_and_backward(between: str, mode: dict[str, bool]) -> None:
    model, calls = with_plugin(LLAMA), [inputs_of(LLAMA)]
    expected = gradients(model, calls)
    model.get_base_model().gradient_checkpointing_enable(mode)
    model.enable_input_require_grads()

    def disturb() -> None:
        with torch.no_grad():
            if between == "generation":
                model.eval()
                model.generate(input_ids=torch.full((1, 9), 50), max_new_tokens=3, pad_token_id=0)
                model.train()
            elif between == "disabled":
                with model.disable_adapter():
                    model(**inputs_of(LLAMA, 2))
            elif between == "evaluation":
                model.eval()(**inputs_of(LLAMA, 2))
                model.train()
            else:
                with pytest.raises(IndexError):
                    model(input_ids=torch.full((1, 9), 10_000))

    assert_equal(gradients(model, calls, disturb), expected)


@pytest.mark.filterwarnings("ignore")
def test_changing_the_ratio_between_forward_and_backward() -> None:
    model, calls = with_plugin(BERT), [inputs_of(BERT)]
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    expected = gradients(model, calls)
    assert_equal(gradients(model, calls, lambda: model.set_compression_ratio(2)), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
def test_enabled_before_or_after_the_plugin(when: str) -> None:
    expected = gradients(with_plugin(BERT), [inputs_of(BERT)])
    base = BERT.build()
    if when == "before":
        base.gradient_checkpointing_enable()
    torch.manual_seed(1)
    model = get_peft_model(base, VariatorConfig(init_weights=False)).train()
    if when == "after":
        model.gradient_checkpointing_enable()
    assert_equal(gradients(model, [inputs_of(BERT)]), expected)


def test_a_network_called_by_itself_after_a_backward_is_outside_of_its_call() -> None:
    model = with_plugin(LLAMA)
    model.get_base_model().gradient_checkpointing_enable()
    gradients(model, [inputs_of(LLAMA)])
    layer = next(module for module in model.modules() if isinstance(module, VariatorLayer))
    with pytest.raises(RuntimeError, match="outside of a call of its model"):
        layer(torch.randn(2, 12, 32))


def test_a_copy_and_a_second_backward() -> None:
    model, calls = with_plugin(BERT), [inputs_of(BERT)]
    model.gradient_checkpointing_enable()
    expected = gradients(model, calls)
    assert_equal(gradients(copy.deepcopy(model), calls), expected)
    assert_equal(gradients(model, calls), expected)


class HomeMade(nn.Module):
    """A stack that checkpoints its layers by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(16, 16)}) for _ in range(2))
        self.checkpoints = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids).requires_grad_()
        for layer in self.layers:

            def run(hidden: Tensor, layer: nn.Module = layer) -> Tensor:
                return hidden + torch.relu(layer["mlp"](hidden))

            hidden = checkpoint(run, hidden, use_reentrant=self.reentrant) if self.checkpoints else run(hidden)
        return {"hidden": hidden * attention_mask.unsqueeze(-1)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_stack_that_checkpoints_by_itself(reentrant: bool) -> None:
    torch.manual_seed(1)
    config = VariatorConfig(target_modules=["mlp"], stack_module="", init_weights=False)
    model = get_peft_model(HomeMade(reentrant), config).train()
    calls = [inputs_of(BERT, seed) for seed in (0, 3)]
    calls = [{name: value % 50 for name, value in inputs.items()} for inputs in calls]
    expected = gradients(model, calls)
    model.get_base_model().checkpoints = True
    assert_equal(gradients(model, calls), expected)
