"""Which compression ratio and how many texts run next: one class a policy, chosen by name.

To add one, write a subclass of [`Policy`] here with a `name`; commands and the simulator take it by that name.
Times are in seconds of one clock, whichever the caller has.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, takewhile
from numbers import Real
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, Protocol

from ..field_types import is_whole, whole_number
from .latency import LatencyTable


__all__ = [
    "POLICIES",
    "FixedRatio",
    "Oracle",
    "Policy",
    "QueueItem",
    "QueueThreshold",
    "SlackFit",
    "Waiting",
    "length_class",
]

MAX_BATCH = 64
SHORTEST_CLASS = 32  # tokens; below it padding costs next to nothing

_LIMITS = attrgetter("min_quality"), attrgetter("max_ratio")
_length = attrgetter("length")
_deadline = attrgetter("deadline")


class Waiting(Protocol):
    """What a policy reads of a text that waits.

    Attributes:
        arrival: when it came, in seconds.
        length: its tokens, special ones included.
        deadline: when its answer is due, in seconds; infinity: never.
        min_quality: least quality of the ratio, on the scale of the latency table; `None`: any.
        max_ratio: largest ratio it may run at; `None`: any.
    """

    @property
    def arrival(self) -> float: ...
    @property
    def length(self) -> int: ...
    @property
    def deadline(self) -> float: ...
    @property
    def min_quality(self) -> float | None: ...
    @property
    def max_ratio(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class QueueItem:
    """A text that waits: see [`Waiting`]."""

    arrival: float
    length: int
    deadline: float
    min_quality: float | None = None
    max_ratio: int | None = None


class Policy:
    """Chooses what runs next. Reads no clock and keeps no state between choices.

    A batch is the first `batch` texts of the queue and runs at one ratio, which all of them allow. A text that allows
    none of a policy's ratios runs on the base, at k = 1.
    """

    name: ClassVar[str]
    ratios: tuple[int, ...]
    """The ratios that it may choose."""

    def choose(self, now: float, queue: Sequence[Waiting], last: int) -> tuple[int, int]:
        """What to run next.

        Args:
            now: the time, in seconds.
            queue: the texts that wait, the most urgent first; behind it come those that allow the same ratios, of them
                those of about its length before others. It can be indexed, sliced and iterated over.
            last: ratio of the batch before, 1 at the start.

        Returns:
            The ratio k, and how many texts from the front of the queue: at least 1, and 0 only if none waits.
        """
        raise NotImplementedError

    def least_seconds(self, length: int, waiting: int) -> float:
        """Seconds that the answer to a text takes at least. One that is due earlier is given up: it stands behind
        those that can be in time, fills their batches where there is room, and is answered when none of them waits, or
        25 seconds after it was due.

        Args:
            length: its tokens.
            waiting: the texts that wait, itself included.

        Returns:
            The seconds; minus infinity where the policy knows none, and gives no text up.
        """
        return -math.inf


def length_class(length: int) -> int:
    """Texts of one class waste less than half of a batch on padding: up to 32 tokens, up to 64, up to 128 …"""
    return (max(length, SHORTEST_CLASS) - 1).bit_length()


def _effective(item: Waiting, k: int, ratios: Sequence[int]) -> int:
    """The largest ratio up to k that a text allows, for policies that know no quality: the base alone is sure."""
    if item.min_quality is not None:
        return 1
    largest = k if item.max_ratio is None else min(k, item.max_ratio)
    return max(ratio for ratio in ratios if ratio <= largest)


def _first(queue: Sequence[Waiting], count: int) -> Sequence[Waiting]:
    try:
        return queue[:count]
    except TypeError:  # a deque
        return list(islice(queue, count))


def _limited_alike(items: Sequence[Waiting]) -> bool:
    """Whether all of them have the limits of the first: counted by `list.count`, which is several times as fast as
    comparing one by one."""
    return all(values.count(values[0]) == len(items) for values in (list(map(of, items)) for of in _LIMITS))


def _take(queue: Sequence[Waiting], k: int, ratios: Sequence[int], max_batch: int) -> tuple[int, int]:
    """The first texts that run at the same ratio, k or the next smaller one that they allow."""
    if not queue:
        return 1, 0
    front = _first(queue, max_batch)
    chosen = _effective(front[0], k, ratios)
    if not _limited_alike(front):
        front = list(takewhile(lambda item: _effective(item, k, ratios) == chosen, front))
    return chosen, len(front)


class FixedRatio(Policy):
    """Always the same ratio.

    Args:
        k: the compression ratio.
        max_batch: most texts in a batch.
    """

    name = "fixed"

    def __init__(self, k: int, max_batch: int = MAX_BATCH) -> None:
        self.k, self.max_batch = whole_number("compression_ratio", k, 1), whole_number("max_batch", max_batch, 1)
        self.ratios = tuple(sorted({1, self.k}))

    def choose(self, now: float, queue: Sequence[Waiting], last: int) -> tuple[int, int]:
        return _take(queue, self.k, self.ratios, self.max_batch)


class QueueThreshold(Policy):
    """A larger ratio the more texts wait. It knows neither latencies nor deadlines.

    Args:
        thresholds: k -> number of waiting texts from which on k is used; below all of them k = 1.
        max_batch: most texts in a batch.
        hysteresis: share by which the queue has to be below a threshold before its ratio is left for a smaller one.

    Raises:
        ValueError: a ratio or a threshold is no positive integer, larger ratios do not have larger thresholds, or the
            hysteresis is not in [0, 1).
    """

    name = "threshold"

    def __init__(
        self, thresholds: Mapping[int, int] | None = None, max_batch: int = MAX_BATCH, hysteresis: float = 0.25
    ) -> None:
        thresholds = {2: 8, 4: 16, 8: 32} if thresholds is None else dict(thresholds)
        ordered = sorted((whole_number("compression_ratio", k, 1), count) for k, count in thresholds.items())
        counts = [count for _, count in ordered]
        if any(not is_whole(count) or count < 1 for count in counts) or counts != sorted(set(counts)):
            raise ValueError(
                f"thresholds={thresholds}: they have to be integers of at least 1 that grow with the ratio."
            )
        self.thresholds = tuple((k, count) for k, count in ordered if k > 1)
        self.max_batch, self.hysteresis = whole_number("max_batch", max_batch, 1), _checked_hysteresis(hysteresis, 1.0)
        self.ratios = (1, *(k for k, _ in self.thresholds))

    def choose(self, now: float, queue: Sequence[Waiting], last: int) -> tuple[int, int]:
        waiting, k = len(queue), 1
        for ratio, count in self.thresholds:
            if waiting >= (count * (1 - self.hysteresis) if ratio <= last else count):
                k = ratio
        return _take(queue, k, self.ratios, self.max_batch)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} has to be a number.")
    return float(value)


def _checked_hysteresis(value: float, below: float) -> float:
    value = _number("hysteresis", value)
    if not 0 <= value < below:
        raise ValueError(f"hysteresis={value!r} has to be at least 0 and below {below}.")
    return value


class _Front(NamedTuple):
    """What the first text of a queue allows, and lengths and deadlines of the texts from it on that may share its
    batch."""

    allowed: tuple[int, ...]
    lengths: list[int]
    deadlines: list[float]


class _Planner(Policy):
    """What policies that know latencies share: the ratios by quality, and what the front of a queue asks for."""

    def __init__(self, table: LatencyTable, max_batch: int) -> None:
        if not callable(getattr(table, "latency", None)):
            raise TypeError(
                f"{type(self).__name__}: the table is {table!r}, where a LatencyTable is meant: what profile_latency "
                "gives, or LatencyTable.load(path) reads."
            )
        self.table, self.max_batch = table, whole_number("max_batch", max_batch, 1)
        self.ratios = tuple(table.ratios)
        quality = table.quality or {}
        known = {k: quality[k] for k in self.ratios if k in quality}
        # The base comes first unless it was measured to be worse; ratios that nobody measured come last.
        best = max(known.values(), default=0.0)
        rank = {k: known.get(k, best if k == 1 else -math.inf) for k in self.ratios}
        self.quality = known
        self._preferred = tuple(sorted(self.ratios, key=lambda k: (-rank[k], k)))

    def choose(self, now: float, queue: Sequence[Waiting], last: int) -> tuple[int, int]:
        if not queue:
            return 1, 0
        front = self._front(queue)
        if front.allowed[0] not in self.ratios:
            return 1, len(front.lengths)  # the base, of which the table does not tell what it takes
        return self._plan(now, queue, last, front)

    def least_seconds(self, length: int, waiting: int) -> float:
        """Those of a batch at the fastest ratio, of as many texts of its length as wait and a batch holds: a smaller
        batch might save one text, and would cost many of those that wait behind it their time."""
        batch = min(waiting, self.max_batch)
        return min(self.table.latency(k, batch, length) for k in self.ratios)

    def _plan(self, now: float, queue: Sequence[Waiting], last: int, front: _Front) -> tuple[int, int]:
        """What to run next, of a queue that is not empty."""
        raise NotImplementedError

    def _allowed(self, item: Waiting) -> tuple[int, ...]:
        """The ratios that a text allows, best first; the base alone, if it allows none."""
        least, largest = item.min_quality, item.max_ratio
        if least is None and largest is None:
            return self._preferred
        allowed = tuple(
            k
            for k in self._preferred
            if (largest is None or k <= largest) and (least is None or self.quality.get(k, -math.inf) >= least)
        )
        return allowed or (1,)

    def _front(self, queue: Sequence[Waiting]) -> _Front:
        front = _first(queue, self.max_batch)
        allowed = self._allowed(front[0])
        if not _limited_alike(front):
            front = list(takewhile(lambda item: self._allowed(item) == allowed, front))
        lengths = list(map(_length, front))
        size = self._sorted_by_length(allowed[-1], lengths) if allowed[-1] in self.ratios else len(front)
        return _Front(allowed, lengths[:size], list(map(_deadline, front[:size])))

    def _sorted_by_length(self, k: int, lengths: list[int]) -> int:
        """How many texts of about the first one's length stand at the front, if a batch of them and one of the others
        take less than one of all, which would be padded to the longest."""
        longest = max(1 << length_class(lengths[0]), SHORTEST_CLASS)
        least = longest // 2 if longest > SHORTEST_CLASS else -1  # a recorded text may have no token
        if least < min(lengths) and max(lengths) <= longest:
            return len(lengths)
        count = next((index for index, length in enumerate(lengths) if not least < length <= longest))
        latency = self.table.latency
        apart = latency(k, count, max(lengths[:count])) + latency(k, len(lengths) - count, max(lengths[count:]))
        return count if apart < latency(k, len(lengths), max(lengths)) else len(lengths)


class SlackFit(_Planner):
    """The most accurate ratio, and the batch, that the slack of the oldest text allows.

    Based on SuperServe (Khare et al. 2023, https://arxiv.org/abs/2312.16733). Slack is the time to the deadline of the
    most urgent text. Ratios are tried from the best on; one fits if a batch at it ends within the slack and, where
    more texts wait than the batch holds, all of them end by the deadline of the last. A text that not even the fastest
    ratio can answer in time limits nothing: it is answered with the first batch. If no ratio fits, the fastest runs on
    as many texts as end within the slack, or on all where nobody's deadline can be met.

    How fast texts come is read off the arrivals in the queue. A batch also has to leave those that come while it runs
    enough of their time, for a batch at the fastest ratio, and no batch is cut to save the oldest text if it then
    holds fewer than come meanwhile: soon all would be late. A lone text whose slack allows it gets the best ratio at
    once (k = 1 without measured quality).

    Texts of other lengths than the first one's wait for a batch of their own, where the table says that this takes
    less than padding all of them to the longest.

    Args:
        table: latencies, and quality if measured; without it a smaller k counts as the better. Then `min_quality` of a
            text is sure to be met by the base alone.
        hysteresis: share by which a more accurate ratio than the last one has to fit better than just so.
        max_batch: most texts in a batch. The table may end below it: it extrapolates.
        reserve_ms: milliseconds of the slack that are left for what the table does not hold: tokenizing, handing over.

    Raises:
        ValueError: an option is out of range.
    """

    name = "slack-fit"

    def __init__(
        self, table: LatencyTable, hysteresis: float = 0.1, max_batch: int = MAX_BATCH, reserve_ms: float = 0.0
    ) -> None:
        super().__init__(table, max_batch)
        self.hysteresis = _checked_hysteresis(hysteresis, math.inf)
        self.reserve_ms = _number("reserve_ms", reserve_ms)
        if not 0 <= self.reserve_ms < math.inf:
            raise ValueError(f"reserve_ms={reserve_ms!r} has to be a number of milliseconds of at least 0.")
        self._rank = {k: index for index, k in enumerate(self._preferred)}

    def _plan(self, now: float, queue: Sequence[Waiting], last: int, front: _Front) -> tuple[int, int]:
        allowed, lengths, deadlines = front
        now += self.reserve_ms / 1000
        latency = self.table.latency
        waiting, count, longest, newest = len(queue), len(lengths), max(lengths), queue[-1]
        if len(allowed) == 1:
            fastest = allowed[0]
        else:
            fastest = min(allowed, key=lambda k: latency(k, count, longest))
        alone = latency(fastest, 1, lengths[0])
        earliest = min(deadlines)
        if earliest - now < alone:
            possible = next((deadline for deadline in deadlines if deadline >= now + alone), None)
            if possible is None:
                return fastest, count
            deadlines = [deadline if deadline > possible else possible for deadline in deadlines]
            earliest = possible
        slack, behind = earliest - now, waiting - count
        last_slack = max(newest.deadline - now, slack)
        rate, allowance = _arrivals(waiting, queue[0], newest)
        prefixes: _Prefixes | None = None
        rank_of_last = self._rank.get(last, 0)
        for k in allowed:
            # Only texts that wait together make a ratio sticky: a lone one finds an idle server.
            factor = 1 + self.hysteresis if waiting > 1 and self._rank[k] < rank_of_last else 1.0
            seconds = factor * latency(k, count, longest)
            if seconds * (1 + behind / count) > last_slack:
                continue
            if seconds <= slack:
                coming = int(min(rate * seconds, self.max_batch))
                if not coming or seconds + latency(fastest, coming, longest) <= allowance:
                    return k, count
                continue
            prefixes = prefixes or _Prefixes.of(lengths, deadlines)
            size = self._largest(k, prefixes, now, factor)
            if not size:
                continue
            part = factor * latency(k, size, prefixes.longest[size - 1])
            if part + (waiting - size) * seconds / count <= last_slack and size >= rate * part:
                return k, size
        prefixes = prefixes or _Prefixes.of(lengths, deadlines)
        size = self._largest(fastest, prefixes, now, 1.0)
        # Batches that are smaller than what comes meanwhile would make everybody late, not only the oldest.
        if not size or size < rate * latency(fastest, size, prefixes.longest[size - 1]):
            return fastest, count
        return fastest, size

    def _largest(self, k: int, prefixes: _Prefixes, now: float, factor: float) -> int:
        """The most texts from the front that end by the most urgent deadline among them, 0 if not even one does."""
        latency, (longest, earliest) = self.table.latency, prefixes
        low, high = 0, len(longest) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if now + factor * latency(k, middle, longest[middle - 1]) <= earliest[middle - 1]:
                low = middle
            else:
                high = middle
        return low


class _Prefixes(NamedTuple):
    """Of the first texts of a batch up to each: the longest, and the most urgent deadline."""

    longest: list[int]
    earliest: list[float]

    @classmethod
    def of(cls, lengths: list[int], deadlines: list[float]) -> _Prefixes:
        return cls(_running(max, lengths), _running(min, deadlines))


def _running(extreme: Callable[..., Any], values: list[Any]) -> list[Any]:
    """The largest or smallest value up to each, mostly the first: a queue stands in the order of deadlines."""
    if extreme(values) == values[0]:
        return values[:1] * len(values)
    return list(accumulate(values, extreme))


def _arrivals(waiting: int, first: Waiting, newest: Waiting) -> tuple[float, float]:
    """Texts that come in a second, as far as the queue tells, and the seconds that the newest was given."""
    passed = newest.arrival - first.arrival
    # One text, or all of them at once, tell nothing about more to come.
    return ((waiting - 1) / passed if passed > 0 else 0.0), newest.deadline - newest.arrival


class Oracle(_Planner):
    """Knows which texts will come, and takes the best ratio that costs none of them its deadline.

    For each ratio, the best first, what follows is played through at the fastest ratio, over all texts that come until
    nobody waits; the ratio is taken if no more of them are late than if the fastest had been taken now. A bound to
    compare policies with, not one to serve with: a choice takes milliseconds.

    Args:
        table: latencies, and quality if measured.
        future: all texts that will come, by arrival.
        max_batch: most texts in a batch.
        horizon: texts to look at, at most.
    """

    name = "oracle"

    def __init__(
        self, table: LatencyTable, future: Sequence[Waiting] = (), max_batch: int = MAX_BATCH, horizon: int = 512
    ) -> None:
        super().__init__(table, max_batch)
        self.future, self.horizon = future, horizon
        self._arrivals = [item.arrival for item in future]
        if any(later < earlier for earlier, later in zip(self._arrivals, self._arrivals[1:], strict=False)):
            raise ValueError("future has to be sorted by arrival.")
        self._in_order = all(before.deadline <= after.deadline for before, after in pairwise(future))

    def _plan(self, now: float, queue: Sequence[Waiting], last: int, front: _Front) -> tuple[int, int]:
        allowed, lengths, _ = front
        count, longest = len(lengths), max(lengths)
        seconds = {k: self.table.latency(k, count, longest) for k in allowed}
        fastest = min(allowed, key=lambda k: seconds[k])
        least = self._late(now, queue, count, seconds[fastest], fastest)
        for k in allowed:
            if k == fastest or self._late(now, queue, count, seconds[k], fastest, least) <= least:
                return k, count
        return fastest, count

    def _late(
        self, now: float, queue: Sequence[Waiting], count: int, seconds: float, fastest: int, most: float = math.inf
    ) -> int:
        """How many texts are late if this batch takes `seconds` and all later ones run at the fastest ratio; beyond
        `most` it stops counting."""
        upcoming = bisect_right(self._arrivals, now)
        now += seconds
        late = sum(item.deadline < now for item in islice(queue, count))
        waiting: list[Any] = sorted(islice(queue, count, count + self.horizon), key=_deadline)
        seen = 0
        while seen < self.horizon and late <= most:
            end = bisect_right(self._arrivals, now, lo=upcoming)
            if end > upcoming:
                behind = not waiting or waiting[-1].deadline <= self.future[upcoming].deadline
                waiting += self.future[upcoming:end]
                if not (behind and self._in_order):
                    waiting[seen:] = sorted(waiting[seen:], key=_deadline)
                upcoming = end
            batch = waiting[seen : seen + self.max_batch]
            if not batch:
                break
            seen += len(batch)
            now += self.table.latency(fastest, len(batch), max(map(_length, batch)))
            late += sum(item.deadline < now for item in batch)
        return late


POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FixedRatio, QueueThreshold, SlackFit, Oracle)}
