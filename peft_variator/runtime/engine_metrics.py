"""What an engine tells about itself: each batch that ran, and what it has done so far."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from dataclasses import dataclass, field, replace


__all__ = ["BatchRecord", "Counts", "EngineMetrics"]

MOST_TIMES = 10_000  # answers whose times are remembered for the percentiles


@dataclass(frozen=True)
class BatchRecord:
    """One batch that ran.

    Args:
        ratio: compression ratio k.
        size: texts in it.
        length: tokens of the longest.
        waited: seconds that each text waited before the batch started.
        seconds: what the batch took.
        late: texts whose answers came after their deadlines.
        failed: whether it raised an error.
        started: when it started, in seconds of the engine's clock.
    """

    ratio: int
    size: int
    length: int
    waited: tuple[float, ...]
    seconds: float
    late: int
    failed: bool
    started: float = 0.0


@dataclass(frozen=True)
class EngineMetrics:
    """What an engine has done so far.

    Args:
        requests: calls that were taken.
        refused: calls that did not fit into the queue.
        waiting: texts that wait now.
        answered: texts that were answered.
        late: those of them whose answers came after their deadlines.
        failed: texts whose batch, or whose request in another batch, failed.
        cancelled: texts that nobody waited for any more.
        batches: batches that ran.
        switches: batches at another ratio than the one before.
        texts_by_ratio: k -> texts answered at it.
        busy_seconds: seconds that batches took, together.
        latency_ms: 50th, 95th and 99th percentile of the last answers, from being asked to being answered, by the
            names `p50`, `p95`, `p99`; empty before the second answer.
    """

    requests: int = 0
    refused: int = 0
    waiting: int = 0
    answered: int = 0
    late: int = 0
    failed: int = 0
    cancelled: int = 0
    batches: int = 0
    switches: int = 0
    texts_by_ratio: dict[int, int] = field(default_factory=dict)
    busy_seconds: float = 0.0
    latency_ms: dict[str, float] = field(default_factory=dict)

    @property
    def attainment(self) -> float:
        """Share of the answers that came in time; 1 before the first."""
        return 1 - self.late / self.answered if self.answered else 1.0


class Counts:
    """Counts up to [`EngineMetrics`]. Not made for threads: its owner has a lock."""

    def __init__(self) -> None:
        self._metrics = EngineMetrics()
        self._by_ratio: Counter[int] = Counter()
        self._times: deque[float] = deque(maxlen=MOST_TIMES)

    def add(self, **more: float) -> None:
        """Raise numbers by their names in `EngineMetrics`."""
        self._metrics = replace(
            self._metrics, **{name: getattr(self._metrics, name) + by for name, by in more.items()}
        )

    def add_answers(self, ratio: int, seconds: list[float], late: int) -> None:
        """Take in a batch that was answered at a ratio, each text so many seconds after it was asked for."""
        self.add(answered=len(seconds), late=late)
        self._by_ratio[ratio] += len(seconds)
        self._times.extend(seconds)

    def metrics(self, waiting: int) -> EngineMetrics:
        """All of it, with the number of texts that wait."""
        latency = {}
        if len(self._times) > 1:
            cuts = statistics.quantiles(self._times, n=100, method="inclusive")
            latency = {f"p{percent}": 1000 * cuts[percent - 1] for percent in (50, 95, 99)}
        by_ratio = dict(sorted(self._by_ratio.items()))
        return replace(self._metrics, waiting=waiting, texts_by_ratio=by_ratio, latency_ms=latency)
