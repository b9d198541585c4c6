"""Texts that wait, the most urgent first, those with the same limits side by side, and the batch that leaves next."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from itertools import chain, islice
from operator import attrgetter
from typing import Generic, TypeVar, overload

from .policies import Policy, Waiting, length_class


__all__ = ["DeadlineQueue", "take_batch"]

Item = TypeVar("Item", bound=Waiting)

_deadline = attrgetter("deadline")
_Key = tuple[tuple[object, float | None, int | None], int]
"""Kind and limits, and class of lengths."""


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
                    # Sorting the heads of some lanes is faster than merging them item by item.
                    heads = (lane[: stop - len(found)] for lane in group)
                    found += sorted(chain.from_iterable(heads), key=_deadline)[: stop - len(found)]
            return found[start:stop]
        if index in (-1, self._length - 1):
            return max((lane[-1] for lane in self._groups[-1]), key=_deadline)
        return next(islice(self, range(self._length)[index], None))


class DeadlineQueue(Generic[Item]):
    """A queue with one lane for each set of limits and class of lengths, so that a batch can be filled with texts that
    run alike and need little padding.

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
        key = ((self._kind(item), item.min_quality, item.max_ratio), length_class(item.length))
        lane = self._lanes.setdefault(key, [])
        if not lane or item.deadline >= lane[-1].deadline:
            lane.append(item)
        else:
            insort(lane, item, key=_deadline)

    def view(self) -> Sequence[Item]:
        """What a policy sees: the lane of the most urgent item, then those with its limits and other lengths, then all
        others of its kind. Empty if none waits."""
        if not self._lanes:
            return ()
        first = self._first()
        if len(self._lanes) == 1:
            return self._lanes[first]
        others = [lane for key, lane in self._lanes.items() if key[0] != first[0] and key[0][0] == first[0][0]]
        return _View([[self._lanes[first]], self._alike(first), others])

    def take(self, count: int) -> list[Item]:
        """Remove the first `count` items of the view, or as many as have the limits of the first."""
        first = self._first()
        taken = list(islice(_View([[self._lanes[first]], self._alike(first)]), count))
        # Every lane is in order, so what is taken of it stands at its front.
        for level, number in Counter(length_class(item.length) for item in taken).items():
            lane = self._lanes[first[0], level]
            del lane[:number]
            if not lane:
                del self._lanes[first[0], level]
        return taken

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Remove the items that are unwanted, and give them back."""
        removed = [item for item in self if unwanted(item)]
        lanes = {key: [item for item in lane if not unwanted(item)] for key, lane in self._lanes.items()}
        self._lanes = {key: lane for key, lane in lanes.items() if lane}
        return removed

    def _first(self) -> _Key:
        if len(self._lanes) == 1:
            return next(iter(self._lanes))
        return min(self._lanes, key=lambda key: self._lanes[key][0].deadline)

    def _alike(self, first: _Key) -> list[list[Item]]:
        """Lanes with the limits of this one, and other lengths."""
        return [lane for key, lane in self._lanes.items() if key[0] == first[0] and key != first]


def take_batch(policy: Policy, queue: DeadlineQueue[Item], now: float, last: int) -> tuple[int, list[Item]]:
    """Take out of a queue what a policy chooses to run next, with its ratio.

    Raises:
        ValueError: it chose no text, or a ratio that the first one does not allow.
    """
    view = queue.view()
    first = view[0]
    ratio, count = policy.choose(now, view, last)
    if count < 1 or (first.max_ratio is not None and ratio > first.max_ratio):
        raise ValueError(
            f"The policy {type(policy).__name__} chose k = {ratio} for {count} texts; it has to choose at least one "
            f"text, and a ratio that it allows (max_ratio={first.max_ratio})."
        )
    return ratio, queue.take(count)
