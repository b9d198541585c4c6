"""The server: its loop between queues in this process, and the whole of it over loopback with OpenAI's own client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from peft_variator.profiling import describe_environment
from peft_variator.runtime import Engine, FixedRatio, LatencyTable
from tests.processes import free_port

from .models import SENTENCES, encoder, made_table, tokenizer


openai = pytest.importorskip("openai")
litserve = pytest.importorskip("litserve")

LIMITS = {"--max-queue": 16, "--max-texts": 12, "--max-bytes": 20_000, "--slo-ms": 5_000, "--timeout": 60}


@dataclass
class Server:
    """A server in processes of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def post(self, **body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/embeddings",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    model = encoder()
    model.save_pretrained(path / "adapter")
    model.unload().save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    made_table(ratios=(1, 2, 8)).save(path / "table.json")
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with started(folder) as running:
        yield running


@contextmanager
def started(folder: Path) -> Iterator[Server]:
    """A server of its own processes, ready; it is ended afterwards."""
    port = free_port()
    words = [str(folder / "base"), "--adapter", str(folder / "adapter"), "--table", str(folder / "table.json")]
    options = [str(part) for pair in LIMITS.items() for part in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_variator", "serve", *words, *options, "--port", str(port), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running = Server(process, port)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline
            try:
                if running.get("/health") == "ok":
                    break
            except OSError:
                time.sleep(0.2)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def vectors(answer: Any) -> np.ndarray:
    return np.array([item.embedding for item in answer.data])


class Answers:
    """What LitServe hands an engine's answers to."""

    def __init__(self) -> None:
        self.queue: Queue[Any] = Queue()

    def send(self, item: Any, consumer_id: int) -> None:
        assert consumer_id == 3
        self.queue.put(item)


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Any]:
    """The worker's part of a server, in this process."""
    from peft_variator.runtime.lit_server import EngineAPI
    from peft_variator.runtime.server import ServeSettings

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    api = EngineAPI(
        ServeSettings(
            str(folder / "base"), str(folder / "adapter"), table=str(folder / "table.json"), slo_ms=60_000, max_queue=4
        )
    )
    try:
        api.setup("cpu")
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    yield api
    api.engine.close()
    api.sender.shutdown()


class Asked:
    """The loop of the worker, and the queues around it."""

    def __init__(self, api: Any) -> None:
        self.api, self.requests, self.answers = api, Queue(), Answers()

    def put(self, name: str, texts: Any, **options: Any) -> None:
        from peft_variator.runtime.lit_server import ServedRequest

        self.requests.put((3, name, time.monotonic(), ServedRequest(input=texts, **options)))
        self.turn()

    def turn(self) -> None:
        self.api.loop.run(self.api, "cpu", 0, self.requests, self.answers, {}, None)

    def answer(self) -> tuple[str, Any]:
        name, (answer, status, *_) = self.answers.queue.get(timeout=60)
        assert (status == litserve.utils.LitAPIStatus.OK) == isinstance(answer, dict)
        return name, answer


@pytest.fixture
def asked(api: Any) -> Asked:
    return Asked(api)


def test_the_loop_answers_what_the_engine_finds(asked: Asked) -> None:
    with Engine(encoder(), tokenizer(), policy=FixedRatio(1)) as engine:
        wanted = engine.embed(SENTENCES)
    asked.put("some", SENTENCES, max_ratio=1)
    name, answer = asked.answer()
    assert name == "some"
    np.testing.assert_allclose(answer["embeddings"][:, :-1], wanted.embeddings, atol=1e-5)
    assert answer["embeddings"][:, -1].tolist() == list(wanted.ratios)  # behind each vector its ratio
    assert answer["prompt_tokens"] == answer["total_tokens"] == sum(wanted.lengths)


def test_the_loop_refuses_and_goes_on(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many, wrong, too late, or failed: each is told to its own request, with a status that says who can help."""
    for name, texts, status, named in [
        ("full", ["a"] * 5, 429, "max_queue is 4"),
        ("wrong", ["\ud800"], 422, "Unicode"),
    ]:
        asked.put(name, texts)
        found, error = asked.answer()
        assert (found, error.status_code) == (name, status)
        assert named in error.detail
    gate = threading.Event()
    handle = asked.api.engine.model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
    try:
        asked.api.settings.__dict__["timeout"] = 0.0  # frozen for users
        asked.put("late", ["a"])
        time.sleep(0.01)
        asked.turn()
        found, error = asked.answer()
        assert (found, error.status_code) == ("late", 504)
    finally:
        asked.api.settings.__dict__["timeout"] = 60.0
        gate.set()
        handle.remove()
    handle = asked.api.engine.model.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        asked.put("failed", ["a"])
        found, error = asked.answer()
        assert (found, error.status_code) == ("failed", 500)
    finally:
        handle.remove()
    words = asked.api.engine.model.get_base_model().embeddings.word_embeddings.weight.data
    kept = words.clone()
    words[tokenizer().convert_tokens_to_ids("z")] = float("nan")
    try:
        asked.put("no number", ["a", "z"])
        found, error = asked.answer()
        assert (found, error.status_code) == ("no number", 500)
        assert "finite" in error.detail
    finally:
        words.copy_(kept)
    asked.put("fine", ["a"])
    assert asked.answer()[0] == "fine"
    assert asked.answers.queue.empty()


def test_the_loop_ends_when_all_is_answered(api: Any, asked: Asked) -> None:
    gate = threading.Event()
    handle = api.engine.model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
    try:
        asked.put("last", ["a"])
        api.ending = True
        asked.turn()  # goes on: someone waits for an answer
        gate.set()
        assert asked.answer()[0] == "last"
        api.sender.submit(int).result()  # behind the answer, which counts as open until it is sent
        with pytest.raises(SystemExit):
            asked.turn()
        assert api.engine.closed
    finally:
        gate.set()
        handle.remove()


@pytest.mark.slow
def test_openai_s_client(server: Server, folder: Path) -> None:
    with Engine(encoder(), tokenizer(), policy=FixedRatio(1)) as engine:
        wanted = engine.embed(SENTENCES)
    for encoding in ("float", openai.NOT_GIVEN):  # left out, the client asks for base64
        answer = server.client.embeddings.create(input=SENTENCES, model="any", encoding_format=encoding)
        np.testing.assert_allclose(vectors(answer), wanted.embeddings.numpy(), atol=1e-5)
        assert [item.ratio for item in answer.data] == [1] * 4  # the policy is idle
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(wanted.lengths)
    assert answer.model == str(folder / "base") == server.client.models.list().data[0].id
    assert server.client.models.retrieve(str(folder / "base")).id == str(folder / "base")
    with pytest.raises(openai.NotFoundError, match="other"):
        server.client.models.retrieve("other")
    merged = server.client.embeddings.create(input=SENTENCES, model="any", extra_body={"slo_ms": 1e-6})
    assert {item.ratio for item in merged.data} == {8}  # late whatever is chosen, so by the fastest
    single = server.client.embeddings.create(input=SENTENCES[1], model="any")
    np.testing.assert_allclose(vectors(single), wanted.embeddings[1:2].numpy(), atol=1e-5)


@pytest.mark.slow
def test_many_at_once(server: Server) -> None:
    texts = [" ".join("abcdefghijklmnopqrstuvwxyz"[i : i + 2 + i % 5]) for i in range(20)]
    with Engine(encoder(), tokenizer(), policy=FixedRatio(1)) as engine:
        wanted = engine.embed(texts).embeddings.numpy()

    def ask(index: int) -> bool:
        answer = server.client.embeddings.create(input=texts[index], model="any", extra_body={"max_ratio": 1})
        return bool(np.allclose(vectors(answer)[0], wanted[index], atol=1e-5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, list(range(20)) * 3))


@pytest.mark.slow
def test_limits_and_wrong_input(server: Server) -> None:
    for body, status in [
        ({"input": []}, 422),
        ({"input": [1, 2]}, 422),
        ({"input": [[1, 2]]}, 422),
        ({"input": {"a": 1}}, 422),
        ({"input": None}, 422),
        ({}, 422),
        ({"input": "a", "dimensions": 8}, 422),
        ({"input": "a", "slo_ms": 0}, 422),
        ({"input": "a", "max_ratio": 0}, 422),
        ({"input": "a", "max_ratio": True}, 422),
        ({"input": "a", "slo_ms": "5"}, 422),
        ({"input": "a", "encoding_format": "hex"}, 422),
        ({"input": "a", "compression_ratio": 4}, 422),
        ({"input": "a", "encoding_format": "base64", "user": "somebody"}, 200),
        ({"input": ["a"] * 13}, 413),
        ({"input": "a " * 20_000}, 413),
        ({"input": ["a"] * 12}, 200),
        ({"input": "a " * 500}, 200),
    ]:
        assert server.post(**body)[0] == status, body
    with pytest.raises(openai.UnprocessableEntityError, match="empty"):
        server.client.embeddings.create(input=[], model="any")
    for method in ("GET", "PUT"):
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/embeddings", method=method)
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(request, timeout=60)
        assert (told.value.code, told.value.headers["Allow"]) == (405, "POST")
    # None of it did harm.
    assert len(server.client.embeddings.create(input=["a", "b"], model="any").data) == 2


@pytest.mark.slow
def test_the_ratio_can_be_asked_for(server: Server) -> None:
    """Nothing can be answered in a nanosecond, so the fastest ratio is taken, or the fastest that is allowed."""
    with Engine(encoder(), tokenizer(), policy=FixedRatio(8)) as engine:
        fast = engine.embed(SENTENCES).embeddings.numpy()
    answer = server.client.embeddings.create(input=SENTENCES, model="any", extra_body={"slo_ms": 1e-6})
    np.testing.assert_allclose(vectors(answer), fast, atol=1e-5)
    limited = server.client.embeddings.create(
        input=SENTENCES, model="any", extra_body={"slo_ms": 1e-6, "max_ratio": 2}
    )
    assert np.abs(vectors(limited) - fast).max() > 1e-4


KINDS = ("count", "success", "failure")


def metrics(server: Server) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in server.get("/metrics").splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.slow
def test_metrics(server: Server) -> None:
    server.client.embeddings.create(input=["a", "b"], model="any")
    server.post(input=[])
    server.post(input="a", slo_ms=-1)
    server.post(input="a" * LIMITS["--max-bytes"])
    with pytest.raises(urllib.error.HTTPError):
        server.get("/v1/embeddings")
    found = metrics(server)
    of = {name: sum(n for each, n in found.items() if each.startswith(f"te_request_{name}_total")) for name in KINDS}
    assert of["count"] == of["success"] + of["failure"]
    assert found['te_request_count_total{method="batch"}'] >= 2
    assert found['te_request_failure_total{err="validation"}'] >= 1
    assert found["te_embed_queue_duration_count"] >= 2
    assert found["te_embed_inference_duration_sum"] > 0
    assert found["te_batch_next_tokens_count"] >= 1
    assert found['variator_texts_total{ratio="1"}'] >= 2
    assert any(name.startswith("te_queue_size") for name in found)


@pytest.mark.slow
def test_it_ends_in_order(server: Server) -> None:
    """The last test: the server answers what it has taken, and leaves no process behind."""
    counter = 'te_request_count_total{method="batch"}'
    before = metrics(server).get(counter, 0)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(server.post, input=["a b c"] * 5) for _ in range(3)]
        while metrics(server).get(counter, 0) < before + 3:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)  # as by what runs it, which passes on what a terminal tells all
        assert [call.result(90)[0] for call in calls] == [200] * 3
    assert server.process.wait(90) == 0
    output = server.process.stdout.read() if server.process.stdout else ""
    assert "Traceback" not in output
    with pytest.raises(OSError, match=r"refused|reset"):
        server.get("/health")


@pytest.mark.slow
def test_told_twice_it_ends_at_once(folder: Path) -> None:
    with started(folder) as server:
        parent = psutil.Process(server.process.pid)
        children = parent.children(recursive=True)
        children = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
        assert children
        for child in children:
            child.suspend()  # so that the server waits for them
        server.process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere/at/all"], "nowhere"),
        (["BASE", "--adapter", "nowhere/at/all"], "nowhere"),
        (["BASE", "--slo-ms", "0"], "--slo-ms"),
        (["BASE", "--policy", "fixed"], "--adapter"),
        (["BASE", "--port", "TAKEN"], "--port"),
        (["BASE", "--device", "cuda:99"], "'cuda:99' cannot be used"),
        (["BASE", "--device", "meta"], "meta"),
        (["BASE", "--max-queue", "16", "--max-texts", "20"], "--max-queue 16"),
        (["BASE", "--table", "."], "is a folder"),
    ],
)
def test_what_cannot_be_served_is_told_at_once(words: list[str], named: str, folder: Path) -> None:
    from typer.testing import CliRunner

    from peft_variator.cli.main import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"BASE": str(folder / "base"), "TAKEN": str(taken.getsockname()[1])}
        done = CliRunner().invoke(app, ["serve", *(places.get(word, word) for word in words)])
    assert done.exit_code == 1
    assert named in done.stderr


@pytest.mark.parametrize("policy", ["slack-fit", "threshold", "fixed", None])
def test_batches_are_no_larger_than_asked_for(folder: Path, policy: str | None) -> None:
    from peft_variator.runtime.server import ServeSettings, make_engine

    settings = ServeSettings(str(folder / "base"), batch_size=3, slo_ms=60_000)
    if policy is not None:
        ratios = (2,) if policy == "fixed" else (1, 2, 8)
        plugin = {"adapter": str(folder / "adapter"), "table": str(folder / "table.json")}
        settings = replace(settings, **plugin, policy=policy, ratios=ratios)
    records: list[Any] = []
    with make_engine(settings, records.append) as engine:
        engine.embed(["a b c"] * 7)
    assert [record.size for record in records] == [3, 3, 1]


def test_a_table_offers_what_was_trained_alone(folder: Path, tmp_path: Path) -> None:
    from peft_variator.runtime.server import ServeSettings, make_engine

    config = json.loads(
        (shutil.copytree(folder / "adapter", tmp_path / "adapter") / "adapter_config.json").read_text()
    )
    settings = ServeSettings(str(folder / "base"), str(tmp_path / "adapter"), table=str(folder / "table.json"))
    for trained, named, kept in (([2], None, (1, 2)), (None, None, (1, 2, 8)), ([2], (8,), (1, 8))):
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(config | {"trained_ratios": trained}))
        with make_engine(replace(settings, ratios=named)) as engine:
            assert engine.policy.ratios == kept
    file.write_text(json.dumps(config | {"trained_ratios": [16]}))
    with pytest.raises(ValueError, match=r"the ratios \[1, 2, 8\], and the plugin was trained for \[16\]"):
        make_engine(settings)


def test_a_table_of_another_model_or_machine_is_told(folder: Path, tmp_path: Path, caplog: Any) -> None:
    from peft_variator.runtime.server import ServeSettings, make_engine

    table = tmp_path / "table.json"
    settings = ServeSettings(str(folder / "base"), str(folder / "adapter"), table=str(table))
    here = describe_environment(torch.device("cpu"))
    for model, environment, told in (
        ("", {}, None),  # a table that was made by hand says nothing
        ("/another/place/base", {key: here[key] for key in ("cpu", "device", "threads")}, None),
        ("other/model", here, "measured with model other/model (here "),
        ("base", here | {"threads": 77}, "measured with threads 77 (here "),
        ("base", here | {"gpu": "a GPU"}, "measured with gpu a GPU (here None)"),
    ):
        caplog.clear()
        replace(made_table(ratios=(1, 2, 8)), model=model, environment=environment).save(table)
        make_engine(settings).close()
        lines = [record.getMessage() for record in caplog.records if "was measured with" in record.getMessage()]
        assert [told in line for line in lines] == ([True] if told else [])


def test_a_table_that_ends_below_the_texts_that_are_served_is_told(folder: Path, tmp_path: Path, caplog: Any) -> None:
    from peft_variator.runtime.server import ServeSettings, make_engine

    table = tmp_path / "table.json"
    made_table(ratios=(1, 2, 8), lengths=(8, 16)).save(table)
    longest = 16
    settings = ServeSettings(str(folder / "base"), str(folder / "adapter"), table=str(table))
    for most in (longest, longest + 1):
        caplog.clear()
        make_engine(replace(settings, max_length=most)).close()
        told = [record.getMessage() for record in caplog.records if "extrapolated" in record.getMessage()]
        assert len(told) == (most > longest)
        assert all(f"up to {longest} tokens" in line for line in told)


def test_nothing_is_measured_where_no_text_fits(folder: Path, tmp_path: Path) -> None:
    from peft_variator.runtime.server import ServeSettings, make_engine

    table = tmp_path / "table.json"
    settings = ServeSettings(str(folder / "base"), str(folder / "adapter"), table=str(table), max_length=2)
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        make_engine(settings)
    assert not table.exists()


@pytest.mark.slow
def test_a_table_is_measured_once_and_kept(folder: Path, tmp_path: Path) -> None:
    from peft_variator.runtime.server import ServeSettings, make_engine

    path = tmp_path / "table.json"
    paths = str(folder / "base"), str(folder / "adapter")
    settings = ServeSettings(*paths, table=str(path), ratios=(4,), batch_size=2, max_length=20)
    measured = [make_engine(settings), make_engine(replace(settings, ratios=None))]
    for engine in measured:
        engine.close()
    assert LatencyTable.load(path) == measured[0].policy.table == measured[1].policy.table
    assert measured[0].policy.ratios == (1, 4)
    assert measured[0].policy.table.batch_sizes == (1, 2)
    assert measured[0].policy.table.lengths == (4, 20)
    with pytest.raises(ValueError, match=r"no ratios \[8\]"):
        make_engine(replace(settings, ratios=(8,)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "oracle"}, "oracle"),
        ({"ratios": (4,)}, "--adapter"),
        ({"policy": "fixed"}, "--adapter"),
        ({"policy": "fixed", "adapter": "somewhere"}, "--ratio"),
        ({"policy": "fixed", "adapter": "somewhere", "ratios": (2, 4)}, "--ratio"),
        ({"pooling": "best"}, "best"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], named: str) -> None:
    from peft_variator.runtime.server import ServeSettings

    with pytest.raises(ValueError, match=named):
        ServeSettings("base", **options)
