"""How many answers can be in time at most, whatever chooses what runs: what no policy can help."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft_variator.runtime import QueueItem


__all__ = ["highest_attainment"]


def highest_attainment(items: Sequence[QueueItem], cost: Callable[[int], float]) -> float:
    """A share of answers that no policy exceeds.

    Each text takes only what it takes in the best batch of texts of its length, and need not wait for the others of
    that batch. Of such texts the most that end in time are found exactly: one after the other is put behind those
    before, and where the last would be late, the one is left out whose absence ends them soonest (Kise, Ibaraki and
    Mine 1978, "A solvable case of the one-machine scheduling problem with ready and due times").

    Args:
        items: the texts by arrival, whose deadlines are in the same order.
        cost: seconds that a text of so many tokens takes at least.

    Raises:
        ValueError: the arrivals or the deadlines are not in order.
    """
    if list(items) != sorted(items, key=lambda item: item.arrival) or list(items) != sorted(
        items, key=lambda item: item.deadline
    ):
        raise ValueError("items has to be sorted by arrival, and their deadlines to be in the same order.")
    known = {length: cost(length) for length in {item.length for item in items}}
    # Of the texts since nothing was to be done last: when each came, what it takes, and when it starts.
    arrivals: list[float] = []
    works: list[float] = []
    starts: list[float] = []
    end, late = 0.0, 0
    for item in items:
        if item.arrival > end:
            arrivals, works, starts = [], [], []
        arrivals.append(item.arrival)
        works.append(known[item.length])
        starts.append(max(end, item.arrival))
        end = starts[-1] + works[-1]
        if end <= item.deadline:
            continue
        late += 1
        # Later texts move up by what is left out, but none to before it came.
        place, saved, room = len(works) - 1, works[-1], float("inf")
        for before in range(len(works) - 2, -1, -1):
            room = min(room, starts[before + 1] - arrivals[before + 1])
            if room <= saved:
                break
            if min(works[before], room) > saved:
                place, saved = before, min(works[before], room)
        end = starts[place]
        del arrivals[place], works[place], starts[place]
        for later in range(place, len(works)):
            starts[later] = max(end, arrivals[later])
            end = starts[later] + works[later]
    return 1 - late / len(items) if items else 1.0
