"""`torch.compile` of a base with a plugin runs and agrees with eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_variator import VariatorConfig

from .cases import ALL, Case, by_name


pytestmark = pytest.mark.slow
BERT, LLAMA, VIT = (next(case for case in ALL if case.name == name) for name in ("bert", "llama", "vit"))


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    torch.compiler.reset()
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, **fields)).eval()


@pytest.mark.parametrize("case", [BERT, LLAMA, VIT], ids=by_name)
def test_same_outputs_and_gradients_with_and_without_padding(case: Case) -> None:
    model = with_plugin(case)
    compiled = torch.compile(model, backend="aot_eager")
    calls = [case.inputs(2, 12)]
    if case.kind != "vision":
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[0, 7:] = 0
        calls += [calls[0] | {"attention_mask": mask}]
    for inputs in calls:
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = next(iter(run(**inputs).values()))
            output.square().mean().backward()
            gradients = [p.grad.clone() for name, p in model.named_parameters() if "variator_" in name]
            results.append([output.detach(), *gradients])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def test_switching_ratio_and_disabling_after_compilation() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for ratio in (4, 2, 1):
            model.set_compression_ratio(ratio)
            expected = model(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)
        model.set_compression_ratio(4)
        with model.disable_adapter():
            expected = BERT.build()(**inputs).last_hidden_state
            torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_graphs_are_not_broken_in_the_layers() -> None:
    """One graph for the stack, whatever the text: layers look their groups up and do not make them."""
    model, graphs = with_plugin(BERT), []

    def count(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    with torch.no_grad():
        for seed in range(3):
            compiled(**BERT.inputs(2, 12, seed))
    assert len(graphs) == 1


def test_inductor() -> None:
    model, inputs = with_plugin(BERT, layers_to_transform=[0]), BERT.inputs(2, 12)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        found = torch.compile(model)(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generation_with_a_compiled_forward() -> None:
    model, ids = with_plugin(LLAMA), LLAMA.inputs(1, 12)["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager")
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert found.tolist() == expected.tolist()
