"""The engine under threads, event loops, failures and wrong input; what it gives is what the model gives."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_variator import using_ratio
from peft_variator.runtime import (
    Embeddings,
    Engine,
    EngineClosed,
    FixedRatio,
    Policy,
    QueueFull,
    QueueThreshold,
    SlackFit,
)
from peft_variator.runtime.tasks import Embed

from .models import SENTENCES, classifier, encoder, made_table, tokenizer


TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return encoder()


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    with Engine(model, TOKENIZER, policy=FixedRatio(4), slo_ms=60_000) as engine:
        yield engine


def expected(model: Any, texts: list[str], ratio: int) -> Tensor:
    """Mean of the hidden states of each text by itself, of length 1."""
    rows = []
    for text in texts:
        inputs = TOKENIZER(text, return_tensors="pt")
        with torch.no_grad(), using_ratio(model, ratio):
            rows.append(model(**inputs).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


class Held:
    """A model whose calls wait until they are let go, so that what comes meanwhile is batched."""

    def __init__(self, model: Any) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self.handle = model.register_forward_pre_hook(self.wait)

    def wait(self, module: Any, args: Any) -> None:
        self.started.set()
        assert self.gate.wait(30)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: Any) -> None:
        self.gate.set()
        self.handle.remove()


@pytest.mark.parametrize("ratio", [1, 4])
def test_embeddings_are_the_model_s(model: Any, ratio: int) -> None:
    with Engine(model, TOKENIZER, policy=FixedRatio(ratio), slo_ms=60_000) as engine:
        result = engine.embed(SENTENCES)
    assert isinstance(result, Embeddings)
    torch.testing.assert_close(result.embeddings, expected(model, SENTENCES, ratio), atol=1e-5, rtol=0)
    assert result.ratios == [ratio] * 4
    assert result.lengths == [14, 7, 17, 3]
    assert result.late == [False] * 4


def test_the_ratio_is_the_model_s_own_without_a_policy(model: Any) -> None:
    with Engine(model, TOKENIZER) as engine:
        assert engine.embed(["a b c"]).ratios == [4]
    with Engine(encoder().unload(), TOKENIZER) as engine:
        assert engine.embed(["a b c"]).ratios == [1]


def test_pooling_and_length(model: Any) -> None:
    inputs = TOKENIZER(SENTENCES[2], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[0]
    poolings = {"cls": hidden[0], "lasttoken": hidden[-1], "max": hidden.amax(0), "mean": hidden.mean(0)}
    for name, vector in poolings.items():
        with Engine(model, TOKENIZER, pooling=name, normalize=False) as engine:
            found = engine.embed([SENTENCES[0], SENTENCES[2]]).embeddings[1]
        torch.testing.assert_close(found, vector, atol=1e-5, rtol=0)
    with (
        Engine(model, TOKENIZER, max_length=5) as engine,
        pytest.warns(UserWarning, match="more than 5 tokens"),
    ):
        assert engine.embed(SENTENCES).lengths == [5, 5, 5, 3]
    with Engine(model, TOKENIZER) as engine, pytest.warns(UserWarning, match="more than 64 tokens"):
        assert engine.embed(["a " * 500]).lengths == [64]


def test_nothing_asked_nothing_given(engine: Engine) -> None:
    result = engine.embed([])
    assert (result.embeddings.shape, result.ratios) == ((0, 32), [])
    assert asyncio.run(engine.aembed(())).embeddings.shape == (0, 32)


@pytest.mark.parametrize(
    "texts",
    [
        *("a b", None, 3, [1], ["a", None], {"a": 1}, [["a"]], b"a", [b"a"], iter(["a"]), ["\ud800"], range(2)),
        np.array(["a", "b"]),
    ],
    ids=lambda texts: type(texts).__name__ if hasattr(texts, "__next__") else repr(texts),
)
def test_what_is_no_list_of_texts_is_refused(engine: Engine, texts: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="texts"):
        engine.embed(texts)
    with pytest.raises((TypeError, ValueError), match="texts"):
        asyncio.run(engine.aembed(texts))
    assert engine.metrics.requests == 0


@pytest.mark.parametrize(
    "options",
    [
        {"slo_ms": 0},
        {"slo_ms": -1.0},
        {"slo_ms": float("nan")},
        {"slo_ms": "50"},
        {"slo_ms": True},
        {"slo_ms": 10**400},
        {"min_quality": 10**400},
        {"min_quality": "high"},
        {"min_quality": float("nan")},
        {"max_ratio": 0},
        {"max_ratio": 2.5},
        {"max_ratio": True},
        {"max_k": 2},
    ],
)
def test_wrong_options_are_refused(engine: Engine, options: dict[str, Any]) -> None:
    """And are no reason for closing, which the fixture does, to wait for a call that never comes."""
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        engine.embed(["a"], **options)
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        asyncio.run(engine.aembed(["a"], **options))
    assert engine.metrics.requests == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"slo_ms": 0}, "slo_ms"),
        ({"max_queue": 0}, "max_queue"),
        ({"pooling": "sum"}, "pooling"),
        ({"max_length": 0}, "max_length"),
        ({"policy": object()}, "policy"),
        ({"on_batch": 3}, "on_batch"),
        ({"clock": 5}, "clock"),
        ({"normalize": "yes"}, "normalize"),
        ({"policy": FixedRatio}, "policy"),
        ({"tokenizer": None}, "tokenizer"),
    ],
)
def test_wrong_engines_are_refused(model: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        Engine(**{"model": model, "tokenizer": TOKENIZER, **options})


def test_ratios_without_a_plugin_are_refused() -> None:
    with pytest.raises(ValueError, match="no active Variator plugin"):
        Engine(encoder().unload(), TOKENIZER, policy=FixedRatio(2))


def test_many_threads_and_many_event_loops(model: Any) -> None:
    """Every answer belongs to its question, whatever it was batched with."""
    texts = [" ".join("abcdefghijklmnopqrstuvwxyz"[i % 20 : i % 20 + 2 + i % 6]) for i in range(60)]
    wanted = expected(model, texts, 2)

    def ask(index: int) -> bool:
        own = [texts[index], texts[(index + 7) % 60]]
        if index % 2:
            found = engine.embed(own)
        else:

            async def several() -> Any:
                return (await asyncio.gather(engine.aembed(own), engine.aembed(own[:1])))[0]

            found = asyncio.run(several())
        return bool(torch.allclose(found.embeddings, wanted[[index, (index + 7) % 60]], atol=1e-5))

    with Engine(model, TOKENIZER, policy=FixedRatio(2), slo_ms=60_000) as engine, ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(60)))
        metrics = engine.metrics
    assert metrics.answered == 30 * 2 + 30 * 3
    assert metrics.texts_by_ratio == {2: 150}
    assert metrics.batches <= 90
    assert (metrics.late, metrics.failed, metrics.waiting, metrics.attainment) == (0, 0, 0, 1.0)


def test_what_waits_runs_together(model: Any) -> None:
    records: list[Any] = []
    options = {"policy": FixedRatio(2), "on_batch": records.append}
    with Engine(model, TOKENIZER, **options) as engine, ThreadPoolExecutor(16) as pool:
        with Held(model) as held:
            first = pool.submit(engine.embed, ["a"])
            assert held.started.wait(30)
            rest = [pool.submit(engine.embed, ["b", "c"]) for _ in range(5)]
            while engine.metrics.waiting < 10:
                time.sleep(0.001)
        assert all(future.result(30) for future in (first, *rest))
    assert [record.size for record in records] == [1, 10]


def test_the_load_chooses_the_ratio(model: Any) -> None:
    with Engine(model, TOKENIZER, policy=QueueThreshold({2: 3, 8: 10})) as engine, ThreadPoolExecutor(16) as pool:
        with Held(model) as held:
            first = pool.submit(engine.embed, ["a"])
            assert held.started.wait(30)
            many = pool.submit(engine.embed, ["b"] * 12)
            while engine.metrics.waiting < 12:
                time.sleep(0.001)
        assert first.result(30).ratios == [1]
        assert many.result(30).ratios == [8] * 12
        assert engine.embed(["a"]).ratios == [1]
        assert engine.metrics.switches == 2


def test_each_call_has_its_limits(model: Any) -> None:
    table = made_table(quality={1: 1.0, 2: 0.9, 4: 0.8, 8: 0.5}, scale=1e4)  # nothing can be in time
    records: list[Any] = []
    options = {"policy": SlackFit(table), "on_batch": records.append}
    with Engine(model, TOKENIZER, **options) as engine, ThreadPoolExecutor(16) as pool:
        with Held(model) as held:
            first = pool.submit(engine.embed, ["a"])
            assert held.started.wait(30)
            limits: list[dict[str, Any]] = [{}, {"max_ratio": 2}, {"min_quality": 0.7}, {"min_quality": 5.0}]
            calls = [pool.submit(engine.embed, ["b", "c"], **each) for each in limits * 2]
            while engine.metrics.waiting < 16:
                time.sleep(0.001)
        assert first.result(30).ratios == [8]
        assert [call.result(30).ratios[0] for call in calls] == [8, 2, 4, 1] * 2
    assert [record.size for record in records] == [1, 4, 4, 4, 4]


def test_a_missed_deadline_is_counted_and_answered(model: Any) -> None:
    with Engine(model, TOKENIZER, slo_ms=1e-3) as engine:
        result = engine.embed(SENTENCES)
        patient = engine.embed(["a"], slo_ms=float("inf"))
        assert engine.metrics.late == 4
        assert engine.metrics.attainment == pytest.approx(0.2)
        assert set(engine.metrics.latency_ms) == {"p50", "p95", "p99"}
    torch.testing.assert_close(result.embeddings, expected(model, SENTENCES, 4), atol=1e-5, rtol=0)
    assert (result.late, patient.late) == ([True] * 4, [False])


def test_the_urgent_come_first(model: Any) -> None:
    order: list[str] = []
    with Engine(model, TOKENIZER, policy=FixedRatio(2, max_batch=1)) as engine:
        with Held(model) as held:
            first = engine.submit(["a"])
            assert held.started.wait(30)
            calls = []
            for name, slo in (("patient", 50_000), ("urgent", 10), ("between", 5_000)):
                calls.append(engine.submit(["b"], slo_ms=slo))
                calls[-1].add_done_callback(lambda done, name=name: order.append(name))  # by the engine's own thread
                while engine.metrics.waiting < len(calls):
                    time.sleep(0.001)
        assert all(call.result(30) for call in (first, *calls))
    assert order == ["urgent", "between", "patient"]


def test_a_full_queue_refuses_a_call_whole(model: Any) -> None:
    with Engine(model, TOKENIZER, max_queue=3) as engine, ThreadPoolExecutor(16) as pool:
        with pytest.raises(QueueFull, match="max_queue is 3"):
            engine.embed(["a"] * 4)
        with Held(model) as held:
            first = pool.submit(engine.embed, ["a"])
            assert held.started.wait(30)
            second = pool.submit(engine.embed, ["a", "b"])
            while engine.metrics.waiting < 2:
                time.sleep(0.001)
            with pytest.raises(QueueFull):
                engine.embed(["a", "b"])
            assert engine.metrics.waiting == engine.waiting == 2
            third = pool.submit(engine.embed, ["c"])
            while engine.metrics.waiting < 3:
                time.sleep(0.001)
        assert [len(call.result(30).ratios) for call in (first, second, third)] == [1, 2, 1]
        assert engine.metrics.refused == 2


def test_a_closed_engine_raises(model: Any) -> None:
    engine = Engine(model, TOKENIZER)
    engine.close()
    engine.close()
    for ask in (lambda: engine.embed(["a"]), lambda: engine.embed([]), lambda: asyncio.run(engine.aembed(["a"]))):
        with pytest.raises(EngineClosed, match="closed"):
            ask()
    with pytest.raises(EngineClosed), engine:
        pass
    assert engine.closed
    assert engine.metrics.answered == 0


def test_closing_answers_what_waits(model: Any) -> None:
    with ThreadPoolExecutor(16) as pool:
        with Held(model) as held:
            engine = Engine(model, TOKENIZER, policy=FixedRatio(2, max_batch=2))
            first = pool.submit(engine.embed, ["a"])
            assert held.started.wait(30)
            rest = [pool.submit(engine.embed, ["b"]) for _ in range(6)]
            while engine.metrics.waiting < 6:
                time.sleep(0.001)
            closing = pool.submit(engine.close)
            while not engine.closed:
                time.sleep(0.001)
            with pytest.raises(EngineClosed):
                engine.embed(["late"])
        closing.result(30)
        assert engine.metrics.answered == 7
        assert all(call.result(30).ratios == [2] for call in (first, *rest))


class SlowToStart:
    """A tokenizer whose first call waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.started, encode = threading.Event(), threading.Event(), Embed.encode

        def wait(task: Embed, texts: list[str], **options: Any) -> Any:
            self.started.set()
            assert self.gate.wait(30)
            return encode(task, texts, **options)

        monkeypatch.setattr(Embed, "encode", wait)


def test_closing_answers_what_was_asked_before(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also calls that are still being tokenized: those of threads, and those of an event loop."""
    engine = Engine(model, TOKENIZER, policy=FixedRatio(2))
    slow = SlowToStart(monkeypatch)

    async def ask() -> list[Any]:
        calls = [asyncio.create_task(engine.aembed(["a"])) for _ in range(3)]
        await asyncio.sleep(0)
        asked.set()
        return await asyncio.gather(*calls)

    asked = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        loop, thread = pool.submit(lambda: asyncio.run(ask())), pool.submit(engine.embed, ["b"])
        assert asked.wait(30)
        assert slow.started.wait(30)
        closing = pool.submit(engine.close)
        while not engine.closed:
            time.sleep(0.001)
        with pytest.raises(EngineClosed):
            engine.embed(["late"])
        slow.gate.set()
        assert [answer.ratios for answer in (*loop.result(30), thread.result(30))] == [[2]] * 4
        closing.result(30)


def test_time_counts_from_the_call(model: Any) -> None:
    """An event loop's own executor may be busy with other things: no answer waits for them, and no clock stops."""
    now = [0.0]

    async def ask() -> Any:
        loop = asyncio.get_running_loop()
        gate = threading.Event()
        busy = [loop.run_in_executor(None, gate.wait, 30) for _ in range(40)]
        call = asyncio.create_task(engine.aembed(["a"]))
        await asyncio.sleep(0)
        now[0] = 5.0
        held.gate.set()
        found = await asyncio.wait_for(call, 20)
        gate.set()
        await asyncio.gather(*busy)
        return found

    options: dict[str, Any] = {"slo_ms": 1000, "clock": lambda: now[0]}
    with Engine(model, TOKENIZER, **options) as engine, Held(model) as held:
        assert asyncio.run(ask()).late == [True]
        assert engine.embed(["a"]).late == [False]


def test_the_engine_s_own_thread_cannot_wait_for_it(model: Any) -> None:
    found: list[Any] = []

    def ask(record: Any) -> None:
        if not found:
            found.append(engine.submit(["b"]))
            with pytest.raises(RuntimeError, match="submit"):
                engine.embed(["b"])

    with Engine(model, TOKENIZER, on_batch=ask, policy=FixedRatio(2)) as engine:
        engine.embed(["a"])
        assert engine.embed(["a"]).ratios == [2]
    assert found[0].result(30).ratios == [2]


def test_numbers_of_numpy_will_do(model: Any) -> None:
    policy = FixedRatio(np.int64(4))  # type: ignore[arg-type]
    with Engine(model, TOKENIZER, policy, max_queue=np.int64(8)) as engine:
        assert engine.embed(["a"], slo_ms=np.float32(50), max_ratio=np.int64(4)).ratios == [4]  # type: ignore[arg-type]
        assert engine.embed(["a"], min_quality=np.float32(0.5)).ratios == [1]


@pytest.mark.slow
def test_a_program_may_end_without_closing() -> None:
    """What waits is answered, in the midst of it nothing is torn down."""
    program = """
import threading
from tests.runtime.models import encoder, tokenizer
from peft_variator.runtime import Engine
engine = Engine(encoder(), tokenizer())
calls = [engine.submit(["a b c"] * 60) for _ in range(10)]
calls[-1].add_done_callback(lambda call: print("last", len(call.result().ratios)))
"""
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["last", "60"])


class Poison:
    """Batches with a text of one token more than `length` fail."""

    def __init__(self, model: Any, length: int) -> None:
        self.length = length
        self.handle = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, module: Any, args: Any, kwargs: Any) -> None:
        if int(kwargs["attention_mask"].sum(1).max()) == self.length:
            raise ArithmeticError("poisoned")


def test_a_failing_batch_fails_its_own_requests_only(model: Any) -> None:
    with Engine(model, TOKENIZER, policy=FixedRatio(2, max_batch=1)) as engine, ThreadPoolExecutor(16) as pool:
        poison = Poison(model, 7)
        try:
            calls = [pool.submit(engine.embed, [text]) for text in ["a b", "a b c d e", "a", "a b c"] * 2]
            for index, call in enumerate(calls):
                if index % 4 == 1:
                    with pytest.raises(ArithmeticError, match="poisoned"):
                        call.result(30)
                else:
                    assert call.result(30).embeddings.shape == (1, 32)
            with pytest.raises(ArithmeticError, match="poisoned"):
                engine.embed(["a", "a b c d e", *["b"] * 20])
            assert engine.metrics.waiting == 0
            assert engine.embed(["a"]).ratios == [2]
        finally:
            poison.handle.remove()
    assert engine.metrics.failed == 2 + 21


def test_a_model_that_no_ratio_can_be_chosen_for_says_so(model: Any) -> None:
    """Compiled in full; without fullgraph it answers as it does eagerly."""
    expected = Engine(model, TOKENIZER, policy=FixedRatio(2)).embed(["a b c d e"]).embeddings
    torch._dynamo.reset()
    with Engine(torch.compile(model, fullgraph=True, backend="eager"), TOKENIZER, policy=FixedRatio(2)) as engine:
        with pytest.raises(
            RuntimeError, match=r"An engine chooses a ratio for each batch.* Compile it without fullgraph"
        ):
            engine.embed(["a b c d e"])
    torch._dynamo.reset()
    with Engine(torch.compile(model, backend="eager"), TOKENIZER, policy=FixedRatio(2)) as engine:
        np.testing.assert_allclose(engine.embed(["a b c d e"]).embeddings, expected, atol=1e-6)


@pytest.mark.parametrize("count", [3, 4])
def test_texts_that_have_no_room_are_not_tokenised(model: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    with Engine(model, TOKENIZER, policy=FixedRatio(2), max_queue=3) as engine:
        seen: list[int] = []
        encode = Embed.encode

        def counted(task: Any, texts: Any, **options: Any) -> Any:
            seen.append(len(texts))
            return encode(task, texts, **options)

        monkeypatch.setattr(Embed, "encode", counted)
        if count == 3:
            assert len(engine.embed(["a"] * count).ratios) == 3
            assert seen == [3]
            return
        with pytest.raises(QueueFull, match="4 texts do not fit into the queue"):
            engine.embed(["a"] * count)
        assert not seen
        assert engine.metrics.refused == 1


def test_a_broken_policy_fails_what_it_was_shown(model: Any) -> None:
    class Broken(Policy):
        def __init__(self) -> None:
            self.answers: list[Any] = [(1, 0), (8, 1), KeyError("gone"), None, (1, 5)]

        def choose(self, now: float, queue: Any, last: int) -> Any:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    with Engine(model, TOKENIZER, policy=Broken()) as engine:
        for error in (ValueError, ValueError, KeyError, TypeError):
            with pytest.raises(error):
                engine.embed(["a"], max_ratio=2)
        assert engine.embed(["a"], max_ratio=2).ratios == [1]


def test_a_cancelled_call_leaves_the_queue(model: Any) -> None:
    with Engine(model, TOKENIZER) as engine, ThreadPoolExecutor(16) as pool:
        with Held(model) as held:
            first = pool.submit(engine.embed, ["a"])
            assert held.started.wait(30)

            async def give_up() -> None:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(engine.aembed(["b", "c"]), 0.2)

            asyncio.run(give_up())
            assert engine.metrics.waiting == 0
        assert first.result(30).ratios == [4]
        assert engine.metrics.cancelled == 2
        assert engine.embed(["a"]).ratios == [4]


def test_batches_are_recorded_and_the_recorder_may_fail(model: Any) -> None:
    records: list[Any] = []

    def record(batch: Any) -> None:
        records.append(batch)
        raise RuntimeError("no disk")

    with Engine(model, TOKENIZER, on_batch=record, slo_ms=60_000) as engine:
        engine.embed(SENTENCES)
        assert engine.embed(["a"]).ratios == [4]
    assert [(each.ratio, each.size, each.length, each.late, each.failed) for each in records] == [
        (4, 4, 17, 0, False),
        (4, 1, 3, 0, False),
    ]
    assert all(each.seconds > 0 and len(each.waited) == each.size for each in records)


def test_whoever_is_called_with_an_answer_harms_nobody(model: Any) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit

    with Engine(model, TOKENIZER, on_batch=leave) as engine, Held(model) as held:
        calls = [engine.submit(["a"])]
        assert held.started.wait(30)
        calls[0].add_done_callback(leave)
        calls += [engine.submit(["b"]) for _ in range(2)]
        held.gate.set()
        assert [call.result(30).ratios for call in calls] == [[4]] * 3


# sentence-transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    path = tmp_path_factory.mktemp("folder")
    base = encoder().unload()
    base.save_pretrained(path / "base")
    TOKENIZER.save_pretrained(path / "base")
    encoder().save_pretrained(path / "adapter")
    transformer = modules.Transformer(str(path / "base"))
    cases = {
        "cls": [modules.Pooling(32, "cls")],
        "normalized": [modules.Pooling(32, ("cls", "max")), modules.Normalize()],
        "dense": [modules.Pooling(32), modules.Dense(32, 8)],
    }
    for name, rest in cases.items():
        sentence_transformers.SentenceTransformer(modules=[transformer, *rest]).save(str(path / name))
    cut = sentence_transformers.SentenceTransformer(modules=[transformer, *cases["normalized"]], truncate_dim=8)
    cut.save(str(path / "cut"))
    return path


@pytest.mark.parametrize("name", ["cls", "normalized", "dense"])
def test_a_sentence_transformer_alone(folder: Path, name: str) -> None:
    from sentence_transformers import SentenceTransformer

    sentences = SentenceTransformer(str(folder / name), device="cpu")
    with Engine(sentences) as engine:
        base = engine.embed(SENTENCES)
        assert base.ratios == [1] * 4
        torch.testing.assert_close(base.embeddings, torch.tensor(sentences.encode(SENTENCES)), atol=1e-5, rtol=0)
        assert engine.embed([]).embeddings.shape == (0, base.embeddings.shape[1])
        with pytest.raises(ValueError, match="only embeds"):
            engine.classify(["a"])
    sentences.load_adapter(str(folder / "adapter"))
    with using_ratio(sentences, 4):
        wanted = torch.tensor(sentences.encode(SENTENCES))
    with Engine(sentences, policy=FixedRatio(4)) as engine:
        found = engine.embed(SENTENCES).embeddings
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (found - base.embeddings).abs().max() > 1e-4
    with Engine(sentences, policy=FixedRatio(1), pooling="lasttoken", normalize=True) as engine:
        norms = engine.embed(SENTENCES).embeddings.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4))
    with pytest.raises(ValueError, match="own tokenizer"):
        Engine(sentences, TOKENIZER)


@pytest.mark.parametrize("name", ["cls", "normalized", "cut"])
def test_a_model_of_such_a_folder_embeds_as_the_folder_says(folder: Path, name: str) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    sentences = SentenceTransformer(str(folder / name), device="cpu")
    model, own = AutoModel.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)
    wanted = torch.tensor(sentences.encode(SENTENCES))
    with Engine(model, own) as engine:
        torch.testing.assert_close(engine.embed(SENTENCES).embeddings, wanted, atol=1e-5, rtol=0)
        assert engine.embed([]).embeddings.shape == (0, wanted.shape[1])
    # Scaled after the cut where that is asked for, and never twice.
    wanted = torch.tensor(sentences.encode(SENTENCES, normalize_embeddings=True))
    with Engine(model, own, normalize=True) as engine:
        torch.testing.assert_close(engine.embed(SENTENCES).embeddings, wanted, atol=1e-5, rtol=0)


def test_what_only_sentence_transformers_can_is_told(folder: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "dense")
    with Engine(model, TOKENIZER) as engine, pytest.raises(ValueError, match="Dense"):
        engine.embed(["a"])
    with Engine(model, TOKENIZER, pooling="mean", normalize=True) as engine:
        assert engine.embed(["a"]).embeddings.shape == (1, 32)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_that_is_left_out_stays_out_of_the_pooling_that_is_named(folder: Path, side: str) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    parts = [modules.Transformer(str(folder / "base")), modules.Pooling(32, include_prompt=False)]
    sentences = SentenceTransformer(modules=parts, prompts={"query": "a b "}, default_prompt_name="query")
    sentences.tokenizer.padding_side = side
    wanted = torch.tensor(sentences.encode(SENTENCES))
    for options in ({}, {"pooling": "mean"}):
        with Engine(sentences, **options) as engine:
            torch.testing.assert_close(engine.embed(SENTENCES).embeddings, wanted, atol=1e-5, rtol=0)


def test_a_convolution_over_tokens_sees_no_padding(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    parts = [modules.Transformer(str(folder / "base")), modules.CNN(32, out_channels=8), modules.Pooling(24)]
    sentences = SentenceTransformer(modules=parts)
    wanted = torch.tensor([sentences.encode(text).tolist() for text in SENTENCES])
    with Engine(sentences) as engine:
        torch.testing.assert_close(engine.embed(SENTENCES).embeddings, wanted, atol=1e-5, rtol=0)


def test_the_limits_of_a_sentence_transformer(folder: Path) -> None:
    """It may cut texts, which is told, and vectors, before they are scaled to length 1."""
    from sentence_transformers import SentenceTransformer

    sentences = SentenceTransformer(str(folder / "cls"), device="cpu", truncate_dim=8)
    sentences.max_seq_length = 7
    wanted = torch.tensor(sentences.encode(SENTENCES))
    with Engine(sentences) as engine, pytest.warns(UserWarning, match="more than 7 tokens"):
        found = engine.embed(SENTENCES)
    torch.testing.assert_close(found.embeddings, wanted, atol=1e-5, rtol=0)
    assert found.lengths == [7, 7, 7, 3]
    with Engine(sentences, normalize=True) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")  # texts that just fit are not cut
        found = engine.embed(SENTENCES[1::2])
    torch.testing.assert_close(found.embeddings.norm(dim=1), torch.ones(2))
    assert found.embeddings.shape == (2, 8)


def test_a_cross_encoder_is_served_by_its_parts(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    classifier(1).unload().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    ranker = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    with pytest.raises(TypeError, match=r"encoder\.transformers_model"):
        Engine(ranker)
    pairs = [("a b", "c d e"), ("a b", "f")]
    with Engine(ranker.transformers_model, ranker.tokenizer) as engine:
        scores = engine.rerank("a b", [document for _, document in pairs]).scores
    wanted = ranker.predict(pairs, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


def test_a_folder_that_lowers_texts_is_for_sentence_transformers_alone(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    shutil.copytree(folder / "cls", tmp_path / "lowered")
    settings = tmp_path / "lowered" / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": True}))
    settings.rename(settings.with_name("sentence_roberta_config.json"))
    model = AutoModel.from_pretrained(tmp_path / "lowered")
    with Engine(model, TOKENIZER) as engine, pytest.raises(ValueError, match="do_lower_case"):
        engine.embed(["A"])


def test_a_plugin_that_is_switched_off_runs_at_one_and_says_so(model: Any) -> None:
    records = []
    with Engine(model, TOKENIZER, FixedRatio(4), on_batch=records.append) as engine:
        assert engine.embed(["a b c"]).ratios == [4]
        model.base_model.disable_adapter_layers()
        try:
            assert engine.embed(["a b c"]).ratios == [1]
        finally:
            model.base_model.enable_adapter_layers()
        assert engine.embed(["a b c"]).ratios == [4]
    assert [record.ratio for record in records] == [4, 1, 4]


def test_a_length_without_room_for_a_text(model: Any) -> None:
    marks = TOKENIZER.num_special_tokens_to_add()
    with pytest.raises(ValueError, match=f"at least {marks + 1}"):
        Engine(model, TOKENIZER, max_length=marks)
    with Engine(model, TOKENIZER, max_length=marks + 1) as engine, pytest.warns(UserWarning, match="tokens"):
        assert engine.embed(["a b c d e"]).lengths == [marks + 1]


def test_several_active_plugins_fail_their_batch_alone(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "other")
    with Engine(model, TOKENIZER, FixedRatio(4)) as engine:
        expected = engine.embed(["a b c"]).embeddings
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match="Only one Variator plugin"):
            engine.embed(["a b c"])
        model.set_adapter("default")
        assert torch.equal(engine.embed(["a b c"]).embeddings, expected)
