"""What a policy would have done with the load of an hour, in seconds: the engine's queue and rules, and no model."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from .engine_metrics import BatchRecord
from .latency import LatencyTable
from .policies import Policy, Waiting
from .queueing import DeadlineQueue, take_batch


__all__ = ["RecordedLatencies", "Simulation", "simulate"]

NEIGHBOURS = 20  # recorded batches among which one is drawn


@dataclass(frozen=True)
class Simulation:
    """How a policy did.

    Args:
        texts: texts that came, all of which were answered.
        late: those whose answers came after their deadlines.
        seconds: from the first arrival to the last answer.
        busy_seconds: how much of that a batch ran.
        batches: batches that ran.
        switches: batches at another ratio than the one before.
        texts_by_ratio: k -> texts answered at it.
        quality: mean quality of the answers; `None` if the quality of a ratio that was used is not known.
        latency_ms: 50th, 95th and 99th percentile from arrival to answer, by the names `p50`, `p95`, `p99`.
        decision_us: microseconds of a choice, `median` and `p99`, measured while simulating.
    """

    texts: int
    late: int
    seconds: float
    busy_seconds: float
    batches: int
    switches: int
    texts_by_ratio: dict[int, int] = field(default_factory=dict)
    quality: float | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    decision_us: dict[str, float] = field(default_factory=dict)

    @property
    def attainment(self) -> float:
        """Share of the answers that came in time."""
        return 1 - self.late / self.texts if self.texts else 1.0

    @property
    def throughput(self) -> float:
        """Texts a second."""
        return self.texts / self.seconds if self.seconds else 0.0

    @property
    def switches_per_minute(self) -> float:
        """How often the ratio changed."""
        return 60 * self.switches / self.seconds if self.seconds else 0.0


class RecordedLatencies:
    """Seconds of a batch as a live engine had them: the table's, times how far off one of its batches was.

    The batch is drawn among those at the same ratio (at any, where none ran at it) that the table expects to take
    about as long: what a table leaves out weighs more on a short batch than on a long one. To it comes what the engine
    needed between two batches while texts were waiting, drawn likewise; so `simulate` needs no `overhead_ms`.

    Args:
        table: latencies.
        records: batches that ran one after the other, with the same model on the same machine.
        seed: of the draw.

    Raises:
        ValueError: no batch of the records went well.
    """

    def __init__(self, table: LatencyTable, records: Iterable[BatchRecord], seed: int = 0) -> None:
        self.table = table
        records = list(records)
        self._batches = table.compare(records)
        self._known: dict[tuple[int, int, int], list[float]] = {}
        self._random = random.Random(seed)
        self.pauses = [
            pause
            for before, after in pairwise(records)
            if 0 <= (pause := after.started - before.started - before.seconds) <= max(after.waited)
        ]
        """Seconds between batches where the next one was waited for."""

    def __call__(self, ratio: int, batch: int, length: int) -> float:
        expected = self.table.latency(ratio, batch, length)
        if (ratio, batch, length) not in self._known:
            self._known[ratio, batch, length] = self._factors(ratio, expected)
        pause = self._random.choice(self.pauses) if self.pauses else 0.0
        return expected * self._random.choice(self._known[ratio, batch, length]) + pause

    def _factors(self, ratio: int, expected: float) -> list[float]:
        """Those of the batches that were expected to take about as long, and of all that are equally near."""
        batches = self._batches.get(ratio) or list(chain.from_iterable(self._batches.values()))
        far = [(abs(math.log(seconds / expected)), factor) for seconds, factor in batches]
        most = sorted(distance for distance, _ in far)[:NEIGHBOURS][-1]
        return [factor for distance, factor in far if distance <= most]


def simulate(
    policy: Policy,
    items: Sequence[Waiting],
    table: LatencyTable,
    *,
    latency: Callable[[int, int, int], float] | None = None,
    overhead_ms: float = 0.0,
) -> Simulation:
    """Play a policy through: texts come, batches run one after the other, as in an [`Engine`].

    Args:
        policy: what chooses.
        items: the texts, by arrival.
        table: latencies, and quality if measured.
        latency: seconds of a batch by ratio, size and length; `None`: the table's.
        overhead_ms: milliseconds that each batch takes besides.

    Raises:
        ValueError: the items are not sorted by arrival, or the policy chose what it may not.
    """
    if any(later.arrival < earlier.arrival for earlier, later in pairwise(items)):
        raise ValueError("items has to be sorted by arrival.")
    seconds_of = latency or table.latency
    queue: DeadlineQueue[Waiting] = DeadlineQueue()
    now = items[0].arrival if items else 0.0
    start, arrived, last, late, busy, switches = now, 0, 1, 0, 0.0, 0
    times: list[float] = []
    decisions: list[float] = []
    by_ratio: Counter[int] = Counter()
    while arrived < len(items) or len(queue):
        if not len(queue):
            now = max(now, items[arrived].arrival)
        while arrived < len(items) and items[arrived].arrival <= now:
            queue.add(items[arrived])
            arrived += 1
        before = time.perf_counter()
        ratio, batch = take_batch(policy, queue, now, last)
        decisions.append(time.perf_counter() - before)
        took = seconds_of(ratio, len(batch), max(item.length for item in batch)) + overhead_ms / 1000
        now, busy = now + took, busy + took
        late += sum(item.deadline < now for item in batch)
        times.extend(now - item.arrival for item in batch)
        by_ratio[ratio] += len(batch)
        switches += ratio != last
        last = ratio
    quality = table.quality or {}
    known = bool(by_ratio) and all(ratio in quality for ratio in by_ratio)
    total = len(times)
    return Simulation(
        texts=total,
        late=late,
        seconds=now - start,
        busy_seconds=busy,
        batches=len(decisions),
        switches=switches,
        texts_by_ratio=dict(sorted(by_ratio.items())),
        quality=sum(quality[ratio] * count for ratio, count in by_ratio.items()) / total if known else None,
        latency_ms={f"p{each}": 1000 * _percentile(times, each) for each in (50, 95, 99)} if times else {},
        decision_us=(
            {"median": 1e6 * statistics.median(decisions), "p99": 1e6 * _percentile(decisions, 99)}
            if decisions
            else {}
        ),
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
