"""Calls to an engine, and their texts that wait: the most urgent first, those with the same limits side by side.

It says what calls may ask for, which batch leaves next, and how the answers of a call come together."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from heapq import merge
from itertools import chain, islice
from numbers import Real
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, cast, overload

from ..field_types import is_whole
from .policies import Policy, Waiting, length_class


if TYPE_CHECKING:
    from .tasks import Encoded, Task


__all__ = [
    "DeadlineQueue",
    "EngineClosed",
    "Limits",
    "QueueFull",
    "QueuedText",
    "Request",
    "checked_limits",
    "checked_query",
    "checked_slo",
    "checked_texts",
    "take_batch",
]

logger = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Waiting)

PATIENCE = 25.0
"""Seconds after its deadline when a text that was given up is answered before all others: none waits for good, nor for
the 30 s after which a server gives a request up. Less would let a burst make all that follows late again."""

_deadline = attrgetter("deadline")
_Key = tuple[bool, tuple[object, float | None, int | None], int]
"""Whether given up, kind and limits, and class of lengths."""


class EngineClosed(RuntimeError):
    """The engine was asked after it had been closed."""


class QueueFull(RuntimeError):
    """A call has more texts than the queue has room for; none of them was taken."""


class Limits(TypedDict, total=False):
    """What one call asks of its answer; each may be left out."""

    slo_ms: float | None
    """Milliseconds until the answer is due; `None`: the engine's."""
    min_quality: float | None
    """Least quality of the ratio that is used, on the scale of the policy's latency table; where nobody measured it,
    and with policies that know none, the base answers, k = 1."""
    max_ratio: int | None
    """Largest ratio that may be used."""


@dataclass(slots=True, eq=False)
class QueuedText:
    """One text that waits: what a policy reads of it, and whose it is."""

    arrival: float
    length: int
    deadline: float
    min_quality: float | None
    max_ratio: int | None
    encoded: Encoded
    request: Request
    index: int


class Request:
    """One call: its texts may run in several batches."""

    def __init__(self, task: Task, count: int) -> None:
        self.task = task
        self.future: Future[Any] = Future()
        self.answers: list[Any] = [None] * count
        self.ratios, self.lengths, self.late = [1] * count, [0] * count, [False] * count
        self.missing = count

    def put(self, index: int, answer: Any, ratio: int, length: int, late: bool) -> None:
        """Take in one answer."""
        self.answers[index], self.ratios[index], self.lengths[index], self.late[index] = answer, ratio, length, late
        self.missing -= 1

    def finish(self) -> None:
        """Hand over what was asked for."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            about = {"ratios": self.ratios, "lengths": self.lengths, "late": self.late}
            answer = self.task.assemble(self.answers, **about)
        except Exception as error:
            _hand_over(self.future.set_exception, error)
        else:
            _hand_over(self.future.set_result, answer)

    def fail(self, error: BaseException) -> None:
        """Hand over an error instead."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            _hand_over(self.future.set_exception, error)


def _hand_over(put: Callable[[Any], None], outcome: Any) -> None:
    try:
        put(outcome)
    except BaseException:  # of somebody's callback, in the thread that everybody waits for
        logger.exception("What was to be called with an answer failed; other answers are not affected.")


def checked_texts(texts: Any, name: str) -> list[str]:
    """Texts as a list.

    Raises:
        TypeError: they are no list of texts.
        ValueError: one of them is no valid Unicode.
    """
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{name} is a {type(texts).__name__}; give a list of texts, also for a single one.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{index}] is a {type(text).__name__}; give a list of texts.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}[{index}] is no valid Unicode: {error.reason}.") from error
    return list(texts)


def checked_query(query: Any) -> str:
    """One text. What is raised is as in `checked_texts`."""
    if not isinstance(query, str):
        raise TypeError(f"query is a {type(query).__name__}; give one text.")
    return checked_texts([query], "query")[0]


def checked_slo(slo_ms: Any) -> float:
    """Milliseconds to a deadline.

    Raises:
        TypeError: it is no number.
        ValueError: it is not above 0.
    """
    if isinstance(slo_ms, bool) or not isinstance(slo_ms, Real):
        raise TypeError(f"slo_ms={slo_ms!r} has to be a number of milliseconds.")
    milliseconds = _checked_float("slo_ms", slo_ms)
    if not milliseconds > 0:
        raise ValueError(f"slo_ms={slo_ms} has to be above 0; infinity means that there is no deadline.")
    return milliseconds


def _checked_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is an integer that is larger than every float; give a smaller number.") from error


def checked_limits(limits: Mapping[str, Any]) -> tuple[float | None, float | None, int | None]:
    """What a call asks for by the names in [`Limits`]: `slo_ms`, `min_quality` and `max_ratio`, `None` for those that
    it leaves out.

    Raises:
        TypeError: a limit is not of its type, or there is none of its name.
        ValueError: it is out of range.
    """
    unknown = sorted({*limits} - {*Limits.__annotations__})
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option of a call; there are {', '.join(Limits.__annotations__)}.")
    slo_ms, min_quality, max_ratio = (cast(Any, limits.get(name)) for name in ("slo_ms", "min_quality", "max_ratio"))
    if min_quality is not None:
        if isinstance(min_quality, bool) or not isinstance(min_quality, Real):
            raise TypeError(f"min_quality={min_quality!r} has to be a number or None.")
        if math.isnan(_checked_float("min_quality", min_quality)):
            raise ValueError("min_quality is not a number; give the least quality, or None.")
    if max_ratio is not None:
        if not is_whole(max_ratio):
            raise TypeError(f"max_ratio={max_ratio!r} has to be an integer or None.")
        if max_ratio < 1:
            raise ValueError(f"max_ratio={max_ratio} has to be at least 1, the base itself.")
    return None if slo_ms is None else checked_slo(slo_ms), min_quality, max_ratio


class _View(Sequence[Item]):
    """Lanes that are looked at as one sequence, but not put together: a queue may be long, and is looked at often.

    Args:
        groups: lanes that follow each other; within a group they are merged by deadline.
    """

    def __init__(self, groups: Sequence[Sequence[list[Item]]]) -> None:
        self._groups = [group for group in groups if group]
        self._length = sum(len(lane) for group in self._groups for lane in group)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(merge(*group, key=_deadline) for group in self._groups)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            if step != 1:
                return list(self)[index]
            found: list[Item] = []
            for group in self._groups:
                if len(found) < stop:
                    found += _heads(group, stop - len(found))
            return found[start:stop] if start else found
        if index in (-1, self._length - 1):
            return max((lane[-1] for lane in self._groups[-1]), key=_deadline)
        if index == 0:
            return min((lane[0] for lane in self._groups[0]), key=_deadline)
        return next(islice(self, range(self._length)[index], None))


def _heads(lanes: Sequence[list[Item]], count: int) -> list[Item]:
    """The most urgent items of some lanes. Sorting their heads is faster than merging them item by item."""
    if len(lanes) == 1:
        return lanes[0][:count]
    return sorted(chain.from_iterable(lane[:count] for lane in lanes), key=_deadline)[:count]


class DeadlineQueue(Generic[Item]):
    """A queue with one lane for each set of limits and class of lengths, so that a batch can be filled with texts that
    run alike and need little padding. Items that were given up have lanes of their own, behind all others.

    Args:
        kind: what may not share a batch, besides texts with other limits: the task, say.
    """

    def __init__(self, kind: Callable[[Item], object] = lambda item: None) -> None:
        self._kind = kind
        self._lanes: dict[_Key, list[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Item]:
        for lane in self._lanes.values():
            yield from lane

    def add(self, item: Item) -> None:
        """Put an item behind all of its lane that are at least as urgent."""
        limits = self._kind(item), item.min_quality, item.max_ratio
        self._put((False, limits, length_class(item.length)), item)

    def _put(self, key: _Key, item: Item) -> None:
        lane = self._lanes.setdefault(key, [])
        if not lane or item.deadline >= lane[-1].deadline:
            lane.append(item)
        else:
            insort(lane, item, key=_deadline)

    def give_up(self, now: float, least_seconds: Callable[[int, int], float]) -> None:
        """Put items that can no longer be in time behind all others, and those that are `PATIENCE` late back.

        Args:
            now: the time, in seconds.
            least_seconds: seconds that an answer takes at least, by the tokens of a text and the texts that wait.
        """
        waiting, long_ago = len(self), now - PATIENCE
        for key, lane in list(self._lanes.items()):
            gone, limits, level = key
            due = long_ago if gone else now + least_seconds(lane[0].length, waiting)
            if lane[0].deadline >= due:
                continue  # none moves, as mostly
            if gone:
                moved = lane[: bisect_left(lane, long_ago, key=_deadline)]
                del lane[: len(moved)]
            else:
                start, end = (bisect_left(lane, time, key=_deadline) for time in (long_ago, due))
                moved = lane[start:end]
                del lane[start:end]
            if not lane:
                del self._lanes[key]
            for item in moved:
                self._put((not gone, limits, level), item)

    def view(self) -> Sequence[Item]:
        """What a policy sees: the lane of the most urgent item, then those with its limits and other lengths, then
        what was given up of those, then all others of its kind. Empty if none waits."""
        if not self._lanes:
            return ()
        first = self._first()
        if len(self._lanes) == 1:
            return self._lanes[first]
        (_, limits, _), groups = first, self._groups(first)
        for gone in (False, True):
            groups.append(
                [
                    lane
                    for key, lane in self._lanes.items()
                    if key[0] is gone and key[1] != limits and key[1][0] == limits[0]
                ]
            )
        return _View(groups)

    def take(self, count: int) -> list[Item]:
        """Remove the first `count` items of the view, or as many as have the limits of the first."""
        first = self._first()
        groups = self._groups(first)
        taken = self._lanes[first][:count]
        self._drop(first, len(taken))
        for group, gone in zip(groups[1:], (first[0], True), strict=True):
            if len(taken) == count:
                break
            heads = _heads(group, count - len(taken)) if group else []
            # Every lane is in order, so what is taken of it stands at its front.
            for level, number in Counter(length_class(item.length) for item in heads).items():
                self._drop((gone, first[1], level), number)
            taken += heads
        return taken

    def _drop(self, key: _Key, count: int) -> None:
        """Remove the first items of a lane, and the lane if it is empty then."""
        lane = self._lanes[key]
        del lane[:count]
        if not lane:
            del self._lanes[key]

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Remove the items that are unwanted, and give them back."""
        removed = [item for item in self if unwanted(item)]
        lanes = {key: [item for item in lane if not unwanted(item)] for key, lane in self._lanes.items()}
        self._lanes = {key: lane for key, lane in lanes.items() if lane}
        return removed

    def _first(self) -> _Key:
        if len(self._lanes) == 1:
            return next(iter(self._lanes))
        return min(self._lanes, key=lambda key: (key[0], self._lanes[key][0].deadline))

    def _groups(self, first: _Key) -> list[list[list[Item]]]:
        """Lanes that may share a batch with this one: itself, those of other lengths, and what was given up."""
        gone, limits, level = first
        alike = [(key, lane) for key, lane in self._lanes.items() if key[1] == limits and key != first]
        same = [lane for key, lane in alike if key[0] is gone]
        return [[self._lanes[first]], same, [] if gone else [lane for key, lane in alike if key[0]]]


def take_batch(policy: Policy, queue: DeadlineQueue[Item], now: float, last: int) -> tuple[int, list[Item]]:
    """Take out of a queue what a policy chooses to run next, with its ratio.

    Raises:
        ValueError: it chose no text, or a ratio that the first one does not allow.
    """
    if isinstance(policy, Policy):  # and not only something with its `choose`
        queue.give_up(now, policy.least_seconds)
    view = queue.view()
    first = view[0]
    ratio, count = policy.choose(now, view, last)
    whole = is_whole(ratio) and is_whole(count)
    if not whole or count < 1 or (first.max_ratio is not None and ratio > first.max_ratio):
        raise ValueError(
            f"The policy {type(policy).__name__} chose k = {ratio!r} for {count!r} texts; it has to choose integers: "
            f"at least one text, and a ratio that it allows (max_ratio={first.max_ratio})."
        )
    return int(ratio), queue.take(int(count))
