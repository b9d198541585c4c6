"""One model, many callers: threads, tasks and nested calls have calls, plugins and ratios of their own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_variator import VariatorConfig, set_compression_ratio, using_ratio
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, BY_NAME, LLAMA, Case, by_name, outputs_of

from .reference import with_plugin


T5 = next(case for case in ALL if case.name == "t5")


def inputs_of(case: Case, seed: int) -> dict[str, Tensor]:
    inputs = case.inputs(1 + seed % 3, 6 + seed % 7, seed)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 5:] = 0
    return inputs | {"attention_mask": mask}


def first(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(iter(outputs_of(model, inputs).values()))


def close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(torch.allclose(left, right, rtol=0, atol=1e-5))


@pytest.mark.parametrize("case", [BERT, LLAMA, T5], ids=by_name)
def test_threads_share_a_model(case: Case) -> None:
    model = with_plugin(case)
    calls = [inputs_of(case, seed) for seed in range(96)]
    expected = [first(model, inputs) for inputs in calls]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda inputs: first(model, inputs), calls))
    assert [index for index, pair in enumerate(zip(found, expected, strict=True)) if not close(*pair)] == []


def test_a_plugin_with_a_head_of_its_own_is_chosen_for_all_alone() -> None:
    """A block would run it under the active plugin's head."""
    case = BY_NAME["bert-sequence"]
    inputs = case.inputs(2, 12)
    model = get_peft_model(case.build(), VariatorConfig(task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", VariatorConfig(task_type="SEQ_CLS"))
    model.add_adapter("bare", VariatorConfig())
    for active, other in (("a", "b"), ("a", "bare"), ("bare", "b")):
        model.set_adapter(active)
        with pytest.raises(ValueError, match="modules_to_save"), using_ratio(model, 2, adapter_name=other):
            pass
        expected = first(model, inputs)
        with using_ratio(model, 4, adapter_name=active):
            assert close(first(model, inputs), expected)


def test_tasks_share_a_model() -> None:
    model = with_plugin(BERT)
    calls = [inputs_of(BERT, seed) for seed in range(64)]
    expected = [first(model, inputs) for inputs in calls]

    async def run() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(first, model, inputs) for inputs in calls))

    assert all(map(close, asyncio.run(run()), expected))


def test_threads_generate() -> None:
    model = with_plugin(LLAMA)
    prompts = [torch.randint(3, 90, (1, 8 + seed)) for seed in range(12)]

    def generate(prompt: Tensor) -> list[int]:
        with torch.no_grad():
            return model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()

    expected = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(generate, prompts)) == expected


def test_threads_train_with_checkpointing() -> None:
    """Each thread's backward computes its layers again with the groups of its own forward."""
    models = [with_plugin(BERT).train() for _ in range(2)]
    models[1].gradient_checkpointing_enable()
    calls = [inputs_of(BERT, seed) for seed in range(8)]
    losses: list[list[Tensor]] = []
    for model in models:
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with ThreadPoolExecutor(4) as pool:
            losses.append(list(pool.map(lambda inputs, model=model: model(**inputs)[0].square().mean(), calls)))
        sum(losses[-1]).backward()
    gradients = [
        {name: p.grad for name, p in model.named_parameters() if "variator_" in name and p.grad is not None}
        for model in models
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_called_inside_its_own_call() -> None:
    model = with_plugin(BERT)
    outer, inner = inputs_of(BERT, 4), inputs_of(BERT, 9)
    expected, expected_inner = first(model, outer), first(model, inner)
    found: list[Tensor] = []
    layer = next(module for module in model.modules() if isinstance(module, VariatorLayer))

    def call_again(module: Any, args: Any) -> None:
        if not found:
            found.append(torch.zeros(0))
            found.append(first(model, inner))

    handle = layer.base_layer.register_forward_pre_hook(call_again)
    result = first(model, outer)
    handle.remove()
    assert close(result, expected)
    assert close(found[1], expected_inner)


# Ratios


def test_no_answer_mixes_ratios() -> None:
    model, inputs = with_plugin(BERT, compression_ratio=2), BERT.inputs(2, 12)
    allowed = []
    for ratio in (1, 2, 4):
        model.set_compression_ratio(ratio)
        allowed.append(first(model, inputs))
    stop = threading.Event()

    def switch() -> None:
        turn = 0
        while not stop.is_set():
            set_compression_ratio(model, (1, 2, 4)[turn % 3])
            turn += 1

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: first(model, inputs), range(120)))
    finally:
        stop.set()
        thread.join()
    assert all(any(close(answer, one) for one in allowed) for answer in found)


def test_using_ratio_counts_in_its_thread_alone() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    expected = {}
    for ratio in (1, 2, 4, 8):
        model.set_compression_ratio(ratio)
        expected[ratio] = first(model, inputs)
    model.set_compression_ratio(4)

    def run(ratio: int) -> bool:
        with using_ratio(model, ratio):
            return all(close(first(model, inputs), expected[ratio]) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, [1, 2, 4, 8] * 8))
    assert close(first(model, inputs), expected[4])


def test_using_ratio_nests_and_restores() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    expected = {ratio: first_at(model, ratio, inputs) for ratio in (1, 2, 4)}
    with model.using_ratio(2):
        assert close(first(model, inputs), expected[2])
        with contextlib.suppress(KeyError), model.using_ratio(1):
            assert torch.equal(first(model, inputs), expected[1])
            raise KeyError
        assert close(first(model, inputs), expected[2])
        model.set_compression_ratio(1)
        assert close(first(model, inputs), expected[2])
        with model.disable_adapter():
            assert torch.equal(first(model, inputs), expected[1])
        # A thread that is started by hand does not inherit the block.
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(first(model, inputs)))
        thread.start()
        thread.join()
        assert torch.equal(results[0], expected[1])
    assert torch.equal(first(model, inputs), expected[1])
    assert model.compression_ratio == 1


def first_at(model: PeftModel, ratio: int, inputs: dict[str, Tensor]) -> Tensor:
    with using_ratio(model, ratio):
        return first(model, inputs)


def test_tasks_inherit_using_ratio_and_do_not_see_each_other_s() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    expected = {ratio: first_at(model, ratio, inputs) for ratio in (1, 2, 4)}

    async def one(ratio: int) -> bool:
        with using_ratio(model, ratio):
            await asyncio.sleep(0.001 * ratio)
            inherited = await asyncio.to_thread(first, model, inputs)
            await asyncio.sleep(0.001)
            return close(inherited, expected[ratio]) and close(first(model, inputs), expected[ratio])

    async def run() -> list[bool]:
        return await asyncio.gather(*(one(ratio) for ratio in (1, 2, 4) * 4))

    assert all(asyncio.run(run()))


def ratios_told(model: PeftModel) -> Callable[[], int]:
    """What tells the ratio that a call has by its output; 16 is what the model is set to."""
    model.set_compression_ratio(16)
    inputs = BERT.inputs(2, 23)
    expected = {ratio: first_at(model, ratio, inputs) for ratio in (1, 2, 4, 8, 16)}
    return lambda: next(ratio for ratio in expected if close(first(model, inputs), expected[ratio]))


def streaming(model: PeftModel, ratio: int, told: Callable[[], int]) -> Iterator[int]:
    with using_ratio(model, ratio):
        yield told()
        yield told()


@pytest.mark.parametrize("order", ["first in, first out", "last in, first out"])
def test_generators_that_run_by_turns_leave_nothing_behind(order: str) -> None:
    model = with_plugin(BERT)
    told = ratios_told(model)
    streams = [streaming(model, ratio, told) for ratio in (2, 4, 8)]
    assert [next(stream) for stream in streams] == [2, 4, 8]
    if order == "first in, first out":
        assert [list(stream) for stream in streams] == [[8], [8], [8]]
    else:
        assert [list(stream) for stream in reversed(streams)] == [[8], [4], [2]]
    assert told() == 16
    with using_ratio(model, 4):
        stream = streaming(model, 2, told)
        assert next(stream) == 2
        with pytest.raises(KeyError):
            stream.throw(KeyError())  # type: ignore[attr-defined]
        assert told() == 4
        stream = streaming(model, 8, told)
        assert next(stream) == 8
    assert told() == 8  # the generator's block is still open
    stream.close()  # type: ignore[attr-defined]
    assert told() == 16


@pytest.mark.parametrize("inherits", [False, True])
def test_a_block_that_another_thread_leaves_ends_everywhere(inherits: bool) -> None:
    model = with_plugin(BERT)
    told = ratios_told(model)
    stream = streaming(model, 2, told)
    assert next(stream) == 2
    context, found = contextvars.copy_context() if inherits else contextvars.Context(), []

    def leave() -> None:
        found.extend([told(), *stream, told()])

    thread = threading.Thread(target=context.run, args=[leave])
    thread.start()
    thread.join()
    before = 2 if inherits else 16
    assert found == [before, before, 16]
    assert told() == 16
    with using_ratio(model, 4):
        assert told() == 4
    assert told() == 16


def test_generators_of_asyncio_leave_nothing_behind() -> None:
    """One that nobody ran to its end is closed by a task of the loop; a task goes on with what it inherited."""
    model = with_plugin(BERT)
    told = ratios_told(model)

    async def stream(ratio: int) -> AsyncIterator[int]:
        with using_ratio(model, ratio):
            yield told()
            yield told()

    async def later(left: asyncio.Event) -> int:
        await left.wait()
        return told()

    async def run() -> list[int]:
        streams, left = [stream(ratio) for ratio in (2, 8)], asyncio.Event()
        found = [await anext(each) for each in streams]
        await asyncio.create_task(streams[0].aclose())  # type: ignore[attr-defined]
        found.append(told())
        await streams[1].aclose()  # type: ignore[attr-defined]
        with using_ratio(model, 4):
            task = asyncio.create_task(later(left))
            await asyncio.sleep(0)
        left.set()
        return [*found, told(), await task, told()]

    assert asyncio.run(run()) == [2, 8, 8, 16, 4, 16]
    assert told() == 16


def test_using_ratio_chooses_a_plugin() -> None:
    model, inputs = with_plugin(BERT), BERT.inputs(2, 12)
    torch.manual_seed(7)
    model.add_adapter("second", VariatorConfig(init_weights=False, bottleneck_dim=8))
    before = first(model, inputs)
    with using_ratio(model, 4, "second"):
        second = first(model, inputs)
    model.set_adapter("second")
    assert close(first(model, inputs), second)
    with using_ratio(model, 4, "default"):
        assert close(first(model, inputs), before)
    assert not close(before, second)


def test_using_ratio_covers_generate() -> None:
    model, prompt = with_plugin(LLAMA), torch.randint(3, 90, (1, 24))
    layer, rows = next(m for m in model.modules() if isinstance(m, VariatorLayer)), []
    layer.base_layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    for ratio in (1, 4, 8):
        rows.clear()
        with using_ratio(model, ratio):
            model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
        # The first and the last token stay by themselves; tokens are then decoded one by one.
        assert rows[1:] == [1, 1]
        assert rows[0] == {1: 24, 4: 1 + 6 + 1, 8: 1 + 3 + 1}[ratio]


@pytest.mark.parametrize("ratio", [0, -1, True, 2.0, "4", None])
def test_what_is_no_ratio_is_refused(ratio: Any) -> None:
    model = with_plugin(BERT)
    with pytest.raises(ValueError, match="compression_ratio"), using_ratio(model, ratio):
        pass
    with pytest.raises(ValueError, match="compression_ratio"):
        model.set_compression_ratio(ratio)


def test_what_has_no_plugin_is_refused() -> None:
    with pytest.raises(ValueError, match="no active Variator plugin"), using_ratio(BERT.build(), 2):
        pass
    with pytest.raises(ValueError, match="no Variator plugin 'other'"), using_ratio(with_plugin(BERT), 2, "other"):
        pass
    with pytest.raises(TypeError, match="exported program"), using_ratio(object(), 2):  # type: ignore[arg-type]
        pass


def test_a_ratio_that_was_not_trained_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    model = with_plugin(BERT, trained_ratios=[4, 2])
    assert model.peft_config["default"].trained_ratios == [2, 4]
    recwarn.clear()
    for ratio in (2, 4, 1, 8, 8, 10**6, 10**6):
        model.set_compression_ratio(ratio)
        first(model, BERT.inputs(2, 12))
    messages = [str(warning.message) for warning in recwarn if "trained for" in str(warning.message)]
    assert len(messages) == 2
    assert all("[2, 4]" in message for message in messages)


def test_a_warning_points_to_the_line_that_chose_the_ratio(recwarn: pytest.WarningsRecorder) -> None:
    model = with_plugin(BERT, trained_ratios=[4])
    recwarn.clear()
    model.set_compression_ratio(8)  # by way of the PeftModel
    model.base_model.set_compression_ratio(16)
    set_compression_ratio(model, 32)
    with model.using_ratio(64):
        pass
    with using_ratio(model, 128):
        pass
    found = [warning for warning in recwarn if "trained for" in str(warning.message)]
    assert len(found) == 5
    assert {warning.filename for warning in found} == {__file__}
