"""How long a forward takes at each compression ratio, batch size and length: kept as JSON, interpolated."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from ..field_types import is_whole
from ..files import write_text
from .engine_metrics import BatchRecord


__all__ = ["LatencyCheck", "LatencyTable", "checked_axis", "checked_quality"]

FORMAT = 1
FEWEST_RECORDS = 5  # batches at a ratio that tell how far off it is
MOST_KNOWN = 100_000  # interpolated points that a table remembers


@dataclass(frozen=True)
class LatencyCheck:
    """A point between those of the grid that was measured, to see how well the table interpolates there.

    Args:
        ratio: compression ratio k.
        batch: texts in the batch.
        length: tokens of each, padding included.
        measured: seconds.
        interpolated: seconds that the table gives.
    """

    ratio: int
    batch: int
    length: int
    measured: float
    interpolated: float

    def __post_init__(self) -> None:
        for name in ("measured", "interpolated"):
            seconds = getattr(self, name)
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
                raise ValueError(f"checks: {name}={seconds!r} is no positive number of seconds.")

    @property
    def relative_error(self) -> float:
        """|interpolated − measured| / measured."""
        return abs(self.interpolated - self.measured) / self.measured


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward for each compression ratio, batch size and padded length.

    Between the points of the grid it interpolates linearly in batch and length. Beyond them it goes on as the last two
    points do, but never falls; below them it stays at the first. It warns once that it does either.

    Args:
        ratios: compression ratios k, ascending; 1 is the base.
        batch_sizes: ascending.
        lengths: tokens of each text of a batch, padding included, ascending.
        seconds: k -> one row a batch size, one column a length: medians.
        quality: k -> how good the answers are at k, larger is better, on any scale; `None`: nobody measured it.
        checks: points off the grid that were measured too.
        model: what was measured.
        environment: machine and versions.

    Raises:
        ValueError: the axes are empty or not ascending positive integers, or the seconds are not positive numbers of
            that shape, or the quality names a ratio that is not in the table.
    """

    ratios: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    seconds: Mapping[int, tuple[tuple[float, ...], ...]]
    quality: Mapping[int, float] | None = None
    checks: tuple[LatencyCheck, ...] = ()
    model: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    _told: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)
    # Policies ask for the same few points again and again, in a few microseconds each.
    _known: dict[tuple[int, int, int], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("ratios", "batch_sizes", "lengths"):
            object.__setattr__(self, name, checked_axis(name, getattr(self, name)))
        rows = {int(k): tuple(tuple(map(float, row)) for row in rows) for k, rows in self.seconds.items()}
        if len(rows) < len(self.seconds) or {*rows} - {*self.ratios}:
            raise ValueError(f"seconds has the ratios {[*self.seconds]}, and the table has {list(self.ratios)}.")
        object.__setattr__(self, "seconds", rows)
        if not isinstance(self.environment, Mapping):
            raise ValueError(f"environment={self.environment!r} has to be a mapping, of what the machine was.")
        for k in self.ratios:
            shape = [len(row) for row in rows.get(k, ())]
            if shape != [len(self.lengths)] * len(self.batch_sizes):
                raise ValueError(
                    f"seconds[{k}] has rows of {shape} values; it needs one row for each of the batch sizes "
                    f"{list(self.batch_sizes)}, with one value for each of the lengths {list(self.lengths)}."
                )
            wrong = [value for row in rows[k] for value in row if not 0 < value < math.inf]
            if wrong:
                raise ValueError(f"seconds[{k}] holds {wrong[0]}; times are positive numbers of seconds.")
        if self.quality is not None:
            object.__setattr__(self, "quality", checked_quality(self.quality, self.ratios))

    def restrict(self, ratios: Sequence[int]) -> LatencyTable:
        """The table of 1 and these ratios alone, for policies that are not to choose another.

        Args:
            ratios: some of `ratios`.

        Raises:
            ValueError: one of them is not in the table.
        """
        kept = tuple(sorted({1, *ratios}))
        missing = sorted({*kept} - {*self.ratios})
        if missing:
            raise ValueError(f"ratios={missing} are not in the table, which has {list(self.ratios)}.")
        return replace(
            self,
            ratios=kept,
            seconds={k: self.seconds[k] for k in kept},
            quality=None if self.quality is None else {k: v for k, v in self.quality.items() if k in kept},
            checks=tuple(check for check in self.checks if check.ratio in kept),
        )

    def compare(self, records: Iterable[BatchRecord]) -> dict[int, list[tuple[float, float]]]:
        """How far off the table is from batches that an engine ran.

        Args:
            records: batches; those that failed are passed over.

        Returns:
            k -> for each batch at it the seconds that the table gives, and how many times those it took.

        Raises:
            ValueError: no batch of the records went well, or one of them has a ratio that the table lacks.
        """
        found: dict[int, list[tuple[float, float]]] = {}
        for each in records:
            if not each.failed:
                expected = self.latency(each.ratio, each.size, each.length)
                found.setdefault(each.ratio, []).append((expected, each.seconds / expected))
        if not found:
            raise ValueError("records has no batch that went well; record some with Engine(on_batch=…).")
        return found

    def calibrated(self, records: Iterable[BatchRecord]) -> LatencyTable:
        """The table as an engine has it: scaled, at each ratio, by how far off its batches were in the median.

        A table holds the model's forward alone, at the speed of the machine when it was measured. An engine also pads
        and pools, and shares the machine with whoever asks; a policy that plans with the table comes too late by that.

        Args:
            records: batches that an engine ran (`Engine(on_batch=…)`). A ratio that fewer than five of them ran at is
                scaled as all of them.

        Raises:
            ValueError: no batch of the records went well, or one of them has a ratio that the table lacks.
        """
        factors = {k: [factor for _, factor in found] for k, found in self.compare(records).items()}
        of_all = statistics.median(chain.from_iterable(factors.values()))
        enough = {k for k, found in factors.items() if len(found) >= FEWEST_RECORDS}
        by_ratio = {k: statistics.median(factors[k]) if k in enough else of_all for k in self.ratios}
        seconds = {k: tuple(tuple(f * value for value in row) for row in self.seconds[k]) for k, f in by_ratio.items()}
        return replace(self, seconds=seconds, checks=())

    def latency(self, ratio: int, batch: int, length: int) -> float:
        """Seconds of one forward.

        Args:
            ratio: one of `ratios`.
            batch: texts in the batch, at least 1.
            length: tokens of the longest, at least 1.

        Raises:
            ValueError: the table has no such ratio.
        """
        point = (ratio, batch, length)
        known = self._known.get(point)
        if known is not None:
            return known
        if ratio not in self.seconds:
            raise ValueError(
                f"ratio={ratio}: the table has the compression ratios {list(self.ratios)}. Profile the model with it."
            )
        self._tell_if_beyond(batch, length)
        rows = self.seconds[ratio]
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[point] = found = _along(
            lambda row: _along(rows[row].__getitem__, self.lengths, length), self.batch_sizes, batch
        )
        return found

    def _tell_if_beyond(self, batch: int, length: int) -> None:
        inside = self.batch_sizes[0] <= batch <= self.batch_sizes[-1] and self.lengths[0] <= length <= self.lengths[-1]
        if inside or self._told:
            return
        self._told.append(True)
        warnings.warn(
            f"A batch of {batch} × {length} tokens is beyond what was measured (batches {self.batch_sizes[0]}–"
            f"{self.batch_sizes[-1]}, lengths {self.lengths[0]}–{self.lengths[-1]}): its time is extrapolated.",
            UserWarning,
            stacklevel=3,
        )

    def min_tokens(self, ratio: int) -> int:
        """From how many tokens a call on a ratio was nowhere slower than the base: a number for `set_min_tokens`.

        Tokens are batch times length. It is one of the points that were measured, and no guess between them.

        Args:
            ratio: one of `ratios`, larger than 1.

        Raises:
            ValueError: the table has no such ratio, or the ratio is slower at the largest point of the table.
        """
        if ratio not in self.seconds or ratio == 1:
            raise ValueError(f"ratio={ratio}: ask for one of {[k for k in self.ratios if k > 1]}, which are measured.")
        points = sorted(
            (batch * length, self.seconds[ratio][row][column] > self.seconds[1][row][column])
            for row, batch in enumerate(self.batch_sizes)
            for column, length in enumerate(self.lengths)
        )
        losing = max((tokens for tokens, loses in points if loses), default=0)
        found = next((tokens for tokens, _ in points if tokens > losing), None)
        if found is None:
            raise ValueError(
                f"ratio={ratio} takes longer than the base at {points[-1][0]} tokens, the most of the table. Profile "
                "larger batches or longer texts, or use the base (k = 1)."
            )
        return found

    @property
    def error(self) -> dict[str, float] | None:
        """Median and largest relative error of interpolation at `checks`; `None` if none could be made."""
        if not self.checks:
            return None
        errors = [check.relative_error for check in self.checks]
        return {"median": statistics.median(errors), "largest": max(errors)}

    def to_json(self) -> str:
        """Everything in it as JSON text."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "environment": dict(self.environment),
            "ratios": list(self.ratios),
            "batch_sizes": list(self.batch_sizes),
            "lengths": list(self.lengths),
            "seconds": {str(k): rows for k, rows in self.seconds.items()},
            "quality": None if self.quality is None else {str(k): value for k, value in self.quality.items()},
            "interpolation_error": self.error,
            "checks": [vars(check) for check in self.checks],
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read what `to_json` gives.

        Raises:
            ValueError: it is no latency table of this format.
        """
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("The latency table is no JSON that can be read: it is nested too deeply.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"This is no latency table of format {FORMAT}. Write one with LatencyTable.save.")
        try:
            quality = content["quality"]
            return cls(
                ratios=tuple(content["ratios"]),
                batch_sizes=tuple(content["batch_sizes"]),
                lengths=tuple(content["lengths"]),
                seconds=content["seconds"],
                quality=None if quality is None else {int(k): value for k, value in quality.items()},
                checks=tuple(LatencyCheck(**check) for check in content["checks"]),
                model=content["model"],
                environment=content["environment"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The latency table lacks a part, or has a wrong one: {error!r}.") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is no latency table of this format.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def checked_axis(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """An axis of a table.

    Raises:
        ValueError: it is empty, or no ascending positive integers.
    """
    whole = all(is_whole(value) and value >= 1 for value in values)
    if not len(values) or not whole or any(low >= high for low, high in pairwise(values)):
        raise ValueError(f"{name} is {list(values)}; it needs integers of at least 1, ascending, each of them once.")
    return tuple(map(int, values))


def checked_quality(quality: Mapping[int, float], ratios: Sequence[int]) -> dict[int, float]:
    """Quality of some ratios.

    Raises:
        TypeError: the quality of a ratio is no number.
        ValueError: a ratio is not among these, or its quality is not finite.
    """
    unknown = sorted(set(quality) - set(ratios))
    if unknown:
        raise ValueError(
            f"quality has the ratios {unknown}, and the table only {list(ratios)}. Leave them out, or measure them."
        )
    for k, value in quality.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"quality[{k}] is {value!r}; it has to be a number, larger for better answers.")
    wrong = {k: value for k, value in quality.items() if not math.isfinite(value)}
    if wrong:
        raise ValueError(f"quality is {wrong}; it has to be finite numbers, larger for better answers.")
    return {k: float(value) for k, value in sorted(quality.items())}


def _along(seconds: Callable[[int], float], axis: Sequence[int], place: int) -> float:
    """Seconds at a place of an axis, from those at its points, of which no more than two are asked for."""
    if len(axis) == 1:
        # More work in proportion, less work no faster: neither promises too much.
        return seconds(0) * max(1.0, place / axis[0])
    # Below the grid a line may go through zero; the edge promises too little rather than too much.
    place = max(place, axis[0])
    cell = min(bisect_right(axis, place) - 1, len(axis) - 2)
    low, high = seconds(cell), seconds(cell + 1)
    found = low + (place - axis[cell]) / (axis[cell + 1] - axis[cell]) * (high - low)
    return max(found, high) if place > axis[-1] else found
