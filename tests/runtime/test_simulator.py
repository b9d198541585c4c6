"""The simulator: nothing is lost, texts come in order, and policies do under a made-up load what they are for."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from peft_variator.runtime import (
    BatchRecord,
    Embeddings,
    Engine,
    FixedRatio,
    LatencyTable,
    Oracle,
    Policy,
    QueueItem,
    QueueThreshold,
    RecordedLatencies,
    SlackFit,
    simulate,
)
from peft_variator.runtime.policies import Waiting

from .models import encoder, made_table, tokenizer


QUALITY = {1: 1.0, 2: 0.97, 4: 0.94, 8: 0.9}
TABLE = made_table(quality=QUALITY, scale=2.0)
SLO = 0.05


def load(share: float, seconds: float, seed: int = 0) -> list[QueueItem]:
    """Poisson arrivals at a share of what the base can do in full batches."""
    rate = share * 64 / TABLE.latency(1, 64, 32)
    drawn, now, items = random.Random(seed), 0.0, []
    while now < seconds:
        now += drawn.expovariate(rate)
        items.append(QueueItem(now, drawn.randint(16, 32), now + SLO))
    return items


def test_nothing_is_lost() -> None:
    items = load(0.8, 2.0)
    result = simulate(FixedRatio(2), items, TABLE)
    assert result.texts == len(items) == sum(result.texts_by_ratio.values())
    assert result.texts_by_ratio.keys() == {2}
    assert result.quality == pytest.approx(0.97)
    assert result.switches == 1
    assert result.busy_seconds <= result.seconds
    assert 0 < result.latency_ms["p50"] <= result.latency_ms["p95"] <= result.latency_ms["p99"]


def test_no_texts_and_texts_in_disorder() -> None:
    empty = simulate(FixedRatio(2), [], TABLE)
    assert (empty.texts, empty.attainment, empty.throughput, empty.quality) == (0, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="sorted by arrival"):
        simulate(FixedRatio(2), [QueueItem(1.0, 8, 2.0), QueueItem(0.5, 8, 2.0)], TABLE)


def test_one_text_takes_what_the_table_says() -> None:
    result = simulate(FixedRatio(4), [QueueItem(3.0, 16, 4.0)], TABLE, overhead_ms=2)
    assert result.latency_ms["p50"] == pytest.approx(1000 * TABLE.latency(4, 1, 16) + 2)
    assert result.seconds == pytest.approx(result.busy_seconds)


def test_slack_fit_keeps_up_where_the_base_fails_and_is_near_the_oracle() -> None:
    items = load(1.2, 10.0)
    results = {
        name: simulate(policy, items, TABLE)
        for name, policy in {
            "base": FixedRatio(1),
            "fastest": FixedRatio(8),
            "slack-fit": SlackFit(TABLE),
            "oracle": Oracle(TABLE, items),
        }.items()
    }
    quality = {name: result.quality or 0.0 for name, result in results.items()}
    assert results["base"].attainment < 0.5
    assert results["slack-fit"].attainment >= 0.99
    assert quality["slack-fit"] > quality["fastest"] + 0.02
    assert quality["slack-fit"] > 0.97 * quality["oracle"]


def test_a_quiet_hour_is_the_base_s() -> None:
    result = simulate(SlackFit(TABLE), load(0.1, 20.0), TABLE)
    assert result.attainment > 0.999
    assert result.quality == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("policy", [FixedRatio(8), QueueThreshold(), SlackFit(TABLE)])
def test_an_hour_takes_seconds(policy: Any) -> None:
    items = load(0.9, 6.0)
    started = time.process_time()
    simulate(policy, items, TABLE)
    assert (time.process_time() - started) / len(items) < 1e-3


def test_a_burst_costs_only_those_that_no_batch_can_answer_in_time() -> None:
    """What is lost stands behind what is not: else each text that comes after a burst would be late, too."""

    class InOrder(Policy):
        def __init__(self, policy: Policy) -> None:
            self.choose = policy.choose  # type: ignore[method-assign]

    slo, batch = 0.2, 16
    burst = [QueueItem(0.0, 16, slo)] * (3 * int(batch * slo / TABLE.latency(8, batch, 16)))
    later = [
        QueueItem(now, 16, now + slo)
        for now in (0.9 * each * TABLE.latency(1, batch, 16) / batch for each in range(1500))
    ]
    items = sorted([*burst, *later], key=lambda item: item.arrival)
    for policy in (SlackFit(TABLE, max_batch=batch), Oracle(TABLE, items, batch)):
        result, in_order = simulate(policy, items, TABLE), simulate(InOrder(policy), items, TABLE)
        assert result.texts == in_order.texts == len(items)
        assert 0 < result.late < len(burst) < in_order.late


def test_recorded_latencies_are_those_of_the_batches() -> None:
    factors = (0.5, 1.0, 3.0)
    records = [BatchRecord(2, 4, 16, (0.0,) * 4, each * TABLE.latency(2, 4, 16), 0, False) for each in factors]
    failed = BatchRecord(2, 4, 16, (0.0,) * 4, 100.0, 0, True)
    recorded = RecordedLatencies(TABLE, [*records, failed])
    drawn = {round(recorded(1, 8, 32) / TABLE.latency(1, 8, 32), 6) for _ in range(200)}
    assert drawn == set(factors)
    with pytest.raises(ValueError, match="on_batch"):
        RecordedLatencies(TABLE, [failed])


def test_recorded_latencies_are_drawn_among_batches_of_their_kind() -> None:
    """What a table leaves out may weigh more on short batches, or at one ratio."""
    records, now = [], 0.0
    for _ in range(100):
        for ratio, size, factor, pause in [(1, 1, 2.0, 0.002), (1, 64, 1.1, 0.004), (8, 64, 1.5, 3.0)]:
            waited = (0.004,) * size  # 3 s: nobody waited
            seconds = factor * TABLE.latency(ratio, size, 16)
            records.append(BatchRecord(ratio, size, 16, waited, seconds, 0, False, now + pause))
            now += pause + seconds
    recorded = RecordedLatencies(TABLE, records)
    for ratio, size, factor in [(1, 1, 2.0), (1, 64, 1.1), (8, 64, 1.5), (8, 1, 1.5)]:
        beyond = {round(recorded(ratio, size, 16) - factor * TABLE.latency(ratio, size, 16), 9) for _ in range(50)}
        assert beyond == {0.002, 0.004}


class InStep(Policy):
    """An engine on a clock of its own: its model takes what the table says, while the texts of a trace come."""

    def __init__(self, policy: Policy, items: list[QueueItem], table: LatencyTable) -> None:
        self.policy, self.ratios, self.items, self.table = policy, policy.ratios, items, table
        self.now, self.came, self.ratio = 0.0, 0, 1
        self.records: list[BatchRecord] = []
        self.calls: dict[int, Future[Embeddings]] = {}
        model = encoder()
        model.register_forward_pre_hook(self.compute, with_kwargs=True)
        self.engine = Engine(model, tokenizer(), self, on_batch=self.records.append, clock=lambda: self.now)

    def choose(self, now: float, queue: Sequence[Waiting], last: int) -> tuple[int, int]:
        self.ratio, count = self.policy.choose(now, queue, last)
        return self.ratio, count

    def least_seconds(self, length: int, waiting: int) -> float:
        return self.policy.least_seconds(length, waiting)

    def compute(self, module: Any, args: Any, kwargs: Any) -> None:
        ended = self.now + self.table.latency(self.ratio, *kwargs["input_ids"].shape)
        while self.came < len(self.items) and self.items[self.came].arrival <= ended:
            self.ask()
        self.now = ended

    def ask(self) -> None:
        index, self.came = self.came, self.came + 1
        item = self.items[index]
        self.now = item.arrival
        self.calls[index] = self.engine.submit(
            [" ".join("a" * (item.length - 2))],
            slo_ms=1000 * (item.deadline - item.arrival),
            min_quality=item.min_quality,
            max_ratio=item.max_ratio,
        )

    def play(self) -> None:
        with self.engine:
            for index in range(len(self.items)):
                if index == self.came:  # nobody waits
                    self.ask()
                self.calls[index].result(60)


@pytest.mark.parametrize(
    "policy", [FixedRatio(2, 8), QueueThreshold({2: 4, 8: 12}, 16), SlackFit(TABLE, max_batch=16)]
)
def test_an_engine_does_what_is_simulated(policy: Policy) -> None:
    """The same batches at the same ratios, and so the same answers late, where a batch takes what the table says."""
    drawn = random.Random(0)
    items = [
        replace(item, min_quality=drawn.choice([None, None, 0.95]), max_ratio=drawn.choice([None, None, None, 4]))
        for item in load(1.1, 0.5)
    ]
    live = InStep(policy, items, TABLE)
    live.play()
    result, metrics = simulate(policy, items, TABLE), live.engine.metrics
    assert 0 < result.late < result.texts == metrics.answered
    assert len(result.texts_by_ratio) >= 2
    assert (metrics.late, metrics.batches, metrics.switches) == (result.late, result.batches, result.switches)
    assert metrics.texts_by_ratio == result.texts_by_ratio
    assert metrics.latency_ms == pytest.approx(result.latency_ms)
    assert metrics.busy_seconds == pytest.approx(result.busy_seconds)
    again = simulate(policy, items, TABLE, latency=RecordedLatencies(TABLE, live.records))
    assert (again.late, again.batches) == (result.late, result.batches)
