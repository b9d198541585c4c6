"""Texts that wait, the most urgent first, those with the same limits side by side, and the batch that leaves next."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

from .policies import Policy, Waiting


__all__ = ["DeadlineQueue", "take_batch"]

Item = TypeVar("Item", bound=Waiting)

_deadline = attrgetter("deadline")


class DeadlineQueue(Generic[Item]):
    """A queue with one lane for each set of limits, so that a batch can be filled with texts that run alike.

    Args:
        kind: what may not share a batch, besides texts with other limits: the task, say.
    """

    def __init__(self, kind: Callable[[Item], object] = lambda item: None) -> None:
        self._kind = kind
        self._lanes: dict[tuple[object, float | None, int | None], list[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Item]:
        for lane in self._lanes.values():
            yield from lane

    def add(self, item: Item) -> None:
        """Put an item behind all that are at least as urgent."""
        lane = self._lanes.setdefault((self._kind(item), item.min_quality, item.max_ratio), [])
        if not lane or item.deadline >= lane[-1].deadline:
            lane.append(item)
        else:
            insort(lane, item, key=_deadline)

    def view(self) -> Sequence[Item]:
        """What a policy sees: the lane of the most urgent item, then all others of its kind. Empty if none waits."""
        if not self._lanes:
            return ()
        first = self._first()
        others = [lane for key, lane in self._lanes.items() if key[0] == first[0] and key != first]
        return self._lanes[first] if not others else [*self._lanes[first], *sorted(sum(others, []), key=_deadline)]

    def take(self, count: int) -> list[Item]:
        """Remove the first `count` items, or as many as have the limits of the first."""
        first = self._first()
        lane = self._lanes[first]
        taken = lane[:count]
        del lane[:count]
        if not lane:
            del self._lanes[first]
        return taken

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Remove the items that are unwanted, and give them back."""
        removed = [item for item in self if unwanted(item)]
        lanes = {key: [item for item in lane if not unwanted(item)] for key, lane in self._lanes.items()}
        self._lanes = {key: lane for key, lane in lanes.items() if lane}
        return removed

    def _first(self) -> tuple[object, float | None, int | None]:
        if len(self._lanes) == 1:
            return next(iter(self._lanes))
        return min(self._lanes, key=lambda key: self._lanes[key][0].deadline)


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
