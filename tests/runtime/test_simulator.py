"""The simulator: nothing is lost, texts come in order, and policies do under a made-up load what they are for."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from peft_variator.runtime import (
    BatchRecord,
    FixedRatio,
    Oracle,
    QueueItem,
    QueueThreshold,
    RecordedLatencies,
    SlackFit,
    simulate,
)

from .models import made_table


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


def test_recorded_latencies_are_those_of_the_batches() -> None:
    factors = (0.5, 1.0, 3.0)
    records = [BatchRecord(2, 4, 16, (0.0,) * 4, each * TABLE.latency(2, 4, 16), 0, False) for each in factors]
    failed = BatchRecord(2, 4, 16, (0.0,) * 4, 100.0, 0, True)
    recorded = RecordedLatencies(TABLE, [*records, failed])
    drawn = {round(recorded(1, 8, 32) / TABLE.latency(1, 8, 32), 6) for _ in range(200)}
    assert drawn == set(factors)
    with pytest.raises(ValueError, match="on_batch"):
        RecordedLatencies(TABLE, [failed])
