"""`torch.compile` of a base with a plugin runs and agrees with eager mode."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_variator import VariatorConfig, using_ratio
from tests.tiny_models import BY_NAME, Case, by_name, outputs_of


def slow(*values: Any) -> list[Any]:
    """Values of a parameter that stand for others and take long to compile."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def shallow(case: Case) -> Case:
    """With one block: two take twice as long to compile."""
    return replace(case, config=case.config | {"num_hidden_layers": 1})


BERT, LLAMA, VIT = (shallow(BY_NAME[name]) for name in ("bert", "llama", "vit"))
CASES = BY_NAME | {case.name: case for case in (BERT, LLAMA, VIT)}
WHOLE = ["bert", "vit", *slow("mpnet", "modernbert", "albert", "t5-encoder", "clip-vision", "llama", "gpt2")]
KEPT = [20, 21]


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    torch.compiler.reset()
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, **fields)).eval()


@pytest.mark.parametrize("case", [VIT, *slow(BERT, LLAMA)], ids=by_name)
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


@pytest.mark.slow
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
    model, graphs = with_plugin(BY_NAME["bert"]), []

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


@pytest.mark.slow
def test_generation_with_a_compiled_forward() -> None:
    model, ids = with_plugin(LLAMA), LLAMA.inputs(1, 12)["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager")
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert found.tolist() == expected.tolist()


def compiled_whole(model: torch.nn.Module, **options: Any) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """The model compiled as one graph a call, and the list that its graphs are added to."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, backend=count, fullgraph=True, **options), graphs


def padded(inputs: dict[str, Tensor], lengths: list[int], left: bool = False) -> dict[str, Tensor]:
    """The inputs with a mask that leaves so many tokens of each sequence."""
    length = inputs["input_ids"].shape[1]
    position, real = torch.arange(length), torch.tensor(lengths).unsqueeze(1)
    return inputs | {"attention_mask": (position >= length - real if left else position < real).long()}


def assert_same(found: Any, expected: dict[str, Tensor], mask: Tensor | None = None) -> None:
    """Every output agrees, at the tokens that are no padding."""
    for name, value in expected.items():
        other = found[name]
        if mask is not None and value.dim() == 3 and value.shape[:2] == mask.shape:
            value, other = value[mask.bool()], other[mask.bool()]
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4)


def with_kept_ids(case: Case, **fields: Any) -> PeftModel:
    return with_plugin(case, **({} if case.kind == "vision" else {"keep_token_ids": KEPT}), **fields)


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph_for_new_lengths_as_the_base(name: str) -> None:
    case = CASES[name]
    if case.kind == "vision":
        calls = [case.inputs(2), case.inputs(3)]
    else:
        shapes = [(2, 12, [12, 7]), (3, 17, [17, 9, 2]), (4, 23, [23, 5, 11, 1])]
        calls = [padded(case.inputs(batch, length), real) for batch, length, real in shapes]
        calls.append(padded(case.inputs(2, 14), [14, 6], left=True))
    model, needed = with_kept_ids(case), 0
    base, graphs = compiled_whole(case.build(), dynamic=True)
    with torch.no_grad():
        for inputs in calls:
            base(**inputs)
        needed = len(graphs)
        torch.compiler.reset()
        compiled, graphs = compiled_whole(model, dynamic=True)
        for inputs in calls:
            assert_same(compiled(**inputs), outputs_of(model, inputs), inputs.get("attention_mask"))
    assert len(graphs) <= needed


@pytest.mark.parametrize("name", ["llama", *slow("bert", "vit")])
def test_no_break_that_the_base_has_not(name: str) -> None:
    case = CASES[name]
    model, inputs = with_kept_ids(case), case.inputs(2, 12)
    if case.kind != "vision":
        inputs = padded(inputs, [12, 7])
    with torch.no_grad():
        found = torch._dynamo.explain(model)(**inputs)
        torch.compiler.reset()
        expected = torch._dynamo.explain(case.build())(**inputs)
    assert found.graph_break_count <= expected.graph_break_count
    assert found.graph_count <= expected.graph_count


@pytest.mark.parametrize("name", ["vit", *slow("clip-vision")])
@pytest.mark.parametrize("ratio", [16, *slow(5)])
def test_windows_that_the_edge_of_an_image_cuts_off(name: str, ratio: int) -> None:
    model, inputs = with_plugin(CASES[name], compression_ratio=ratio), CASES[name].inputs(2)
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        assert_same(compiled(**inputs), outputs_of(model, inputs))


def test_labels_of_a_causal_model_and_padding_on_the_left() -> None:
    model, inputs = with_plugin(LLAMA), padded(LLAMA.inputs(2, 16), [16, 11], left=True)
    labels = inputs["input_ids"].clone()
    labels[:, :12] = -100
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        expected = outputs_of(model, inputs | {"labels": labels})
        found = compiled(**inputs, labels=labels)
    torch.testing.assert_close(found.loss, expected["loss"], rtol=1e-4, atol=1e-4)
    assert_same(found, expected, inputs["attention_mask"])


def flattened(**told: Tensor) -> dict[str, Tensor]:
    """Texts of 5, 9 and 6 tokens in one row."""
    return {"input_ids": LLAMA.inputs(1, 20)["input_ids"]} | told


def test_flattened_texts_by_their_positions() -> None:
    positions = torch.cat([torch.arange(length) for length in (5, 9, 6)]).unsqueeze(0)
    inputs = flattened(position_ids=positions)
    model = with_plugin(LLAMA, max_kept_tokens=8)
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        assert_same(compiled(**inputs), outputs_of(model, inputs))


def test_one_graph_a_ratio() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    compiled, graphs = compiled_whole(model)
    with torch.no_grad():
        for _ in range(2):
            for ratio in (4, 2):
                model.set_compression_ratio(ratio)
                assert_same(compiled(**inputs), outputs_of(model, inputs))
    assert len(graphs) == 2


# Each other token is kept: far more of them than there is room for.
CROWDED = torch.full((2, 40), 15)
CROWDED[:, ::2] = KEPT[0]


@pytest.mark.parametrize("backend", ["eager", *slow("aot_eager", "inductor")])
def test_more_kept_tokens_than_there_is_room_for_are_an_error(backend: str) -> None:
    model = with_plugin(BERT, keep_token_ids=KEPT, max_kept_tokens=1, layers_to_transform=[0])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            compiled(input_ids=CROWDED)
        inputs = {"input_ids": torch.full((2, 40), 15)}  # the same graph goes on with what fits
        assert_same(compiled(**inputs), outputs_of(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", *slow("inductor")])
def test_a_pooled_output_that_is_read_at_padding(backend: str) -> None:
    """SigLIP reads the last place of a row; there is room for it beside as many kept tokens as the rule names."""
    base = shallow(BY_NAME["siglip-text"])
    torch.compiler.reset()
    model = get_peft_model(base.build(), VariatorConfig(correction_dim=1.0, keep_last_tokens=3)).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[1, 9:], mask[2, 12:] = 0, 0
    inputs = base.inputs(3, 13) | {"attention_mask": mask}
    with torch.no_grad():
        expected = base.build()(**inputs).pooler_output
        torch.testing.assert_close(compiled(**inputs).pooler_output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_tokens_that_are_kept_at_the_ends_have_room_of_their_own(case: Case) -> None:
    """K counts the first of each end."""
    model = with_plugin(case, keep_first_tokens=5, keep_last_tokens=11, max_kept_tokens=2)
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        for length in (18, 19, 20, 21, 40, 7):
            inputs = case.inputs(2, length)
            assert_same(compiled(**inputs), outputs_of(model, inputs))


def test_enough_room_is_no_error() -> None:
    model = with_plugin(BERT, keep_token_ids=KEPT, max_kept_tokens=20)
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        assert_same(compiled(input_ids=CROWDED), outputs_of(model, {"input_ids": CROWDED}))


@pytest.mark.slow
def test_using_ratio_and_one_whole_graph_exclude_each_other() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    expected = outputs_of(model, inputs)
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        compiled(**inputs)
        with using_ratio(model, 2), pytest.raises(Exception, match="set_compression_ratio"):
            compiled(**inputs)
        assert_same(compiled(**inputs), expected)


def test_using_ratio_in_another_thread_is_no_silent_fault_either() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    compiled, _ = compiled_whole(model)
    is_open, may_close = threading.Event(), threading.Event()

    def hold() -> None:
        with using_ratio(model, 2):
            is_open.set()
            may_close.wait(60)

    with torch.no_grad():
        compiled(**inputs)
        thread = threading.Thread(target=contextvars.Context().run, args=(hold,))
        thread.start()
        try:
            assert is_open.wait(60)
            with pytest.raises(Exception, match="using_ratio"):
                compiled(**inputs)
        finally:
            may_close.set()
            thread.join()
        compiled(**inputs)


@pytest.mark.slow
def test_using_ratio_is_honoured_where_graphs_may_break() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    at_four, compiled = outputs_of(model, inputs), torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_same(compiled(**inputs), at_four)
        with using_ratio(model, 2):
            at_two = outputs_of(model, inputs)
            assert_same(compiled(**inputs), at_two)
        assert_same(compiled(**inputs), at_four)
    assert not torch.allclose(at_two["last_hidden_state"], at_four["last_hidden_state"], atol=1e-2)


@pytest.mark.slow
def test_threads_share_a_compiled_model() -> None:
    model = with_plugin(BERT)
    compiled, _ = compiled_whole(model, dynamic=True)
    calls = [padded(BERT.inputs(2, 12 + seed, seed), [12 + seed, 5]) for seed in range(4)]
    expected = [outputs_of(model, inputs) for inputs in calls]
    with torch.no_grad():
        compiled(**calls[0])
    faults: list[BaseException] = []

    def run(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(3):
                    assert_same(compiled(**calls[index]), expected[index], calls[index]["attention_mask"])
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize(
    ("case", "fields"),
    [(BERT, {"keep_token_ids": KEPT}), (BERT, {"correction_form": "sliced"}), (VIT, {})],
    ids=["text", "sliced", "images"],
)
def test_a_traced_model_takes_other_values(case: Case, fields: dict[str, Any]) -> None:
    model = with_plugin(case, **fields)
    inputs, other = case.inputs(2, 12), case.inputs(2, 12, seed=3)
    if case is BERT:
        inputs, other = padded(inputs, [12, 7]), padded(other, [4, 12])
    base = model.get_base_model()
    base.config.return_dict = False
    with torch.no_grad():
        traced = torch.jit.trace(base, tuple(inputs.values()), check_trace=False)
        found, expected = traced(*other.values())[0], base(**other)[0]
    real = other["attention_mask"].bool() if case is BERT else slice(None)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_tracing_more_kept_tokens_than_there_is_room_for_is_an_error() -> None:
    base = with_plugin(BERT, keep_token_ids=KEPT, max_kept_tokens=1).get_base_model()
    base.config.return_dict = False
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        torch.jit.trace(base, (CROWDED,), check_trace=False)


# What waits for a device


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or its shape, a program has to wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0]
        if name.lstrip("_").startswith(tuple(each.lstrip("_") for each in self.NAMES)):
            self.seen[name] += 1
        elif name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        ):
            self.seen[name] += 1
        return function(*args, **kwargs or {})


def waits_of(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Counter[str]:
    with torch.no_grad(), Waits() as waits:
        model(**inputs)
    return waits.seen


def calls_to_count() -> dict[str, tuple[Case, dict[str, Tensor]]]:
    bert, llama, vit = (BY_NAME[name] for name in ("bert", "llama", "vit"))
    prompt = padded(llama.inputs(2, 16), [16, 11], left=True)
    labels = prompt["input_ids"].clone()
    labels[:, :12] = -100
    return {
        "padding": (bert, padded(bert.inputs(2, 12), [12, 7])),
        "prompt": (llama, prompt),
        "labels": (llama, prompt | {"labels": labels}),
        "images": (vit, vit.inputs(2)),
    }


@pytest.mark.parametrize("call", calls_to_count())
def test_a_call_waits_for_no_value_that_the_base_does_not_wait_for(call: str) -> None:
    case, inputs = calls_to_count()[call]
    assert waits_of(with_kept_ids(case), inputs) == waits_of(case.build(), inputs)


def test_waiting_is_seen() -> None:
    class Waiting(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0] if bool(x.any()) else x.nonzero()

    assert waits_of(Waiting(), {"x": torch.ones(3)}).total() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose driver counts what waits for it")
@pytest.mark.parametrize("call", calls_to_count())
def test_a_call_that_is_captured_does_not_wait_for_the_gpu(call: str) -> None:
    case, inputs = calls_to_count()[call]
    if "labels" in inputs:
        pytest.skip("the loss of the base model itself waits")
    model = with_kept_ids(case).cuda()
    inputs = {name: value.cuda() for name, value in inputs.items()}
    compiled, _ = compiled_whole(model)
    with torch.no_grad():
        compiled(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
