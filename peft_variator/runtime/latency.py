"""How long a forward takes at each compression ratio, batch size and length: measured, kept as JSON, interpolated."""

from __future__ import annotations

import json
import math
import re
import statistics
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PreTrainedModel

from ..files import write_text
from ..models import Task
from ..profiling import Candidate, describe_environment, make_inputs, make_lengths, time_alternately
from ..tuners.variator import using_ratio
from ..tuners.variator.layer import plugin_layers
from .metrics import BatchRecord


__all__ = ["LatencyCheck", "LatencyTable", "profile_latency", "quality_from_card"]

FORMAT = 1
MOST_KNOWN = 100_000  # interpolated points that a table remembers
_RATIO = re.compile(r"k = \d+")  # the title of a column in a card
LESS_IS_BETTER = "less is better"  # how a row of a card is marked whose figures are no quality
MOST_CHECKS = 4  # cells whose centres are measured beside the grid, for each ratio


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
            object.__setattr__(self, name, _checked_axis(name, getattr(self, name)))
        rows = {int(k): tuple(tuple(map(float, row)) for row in rows) for k, rows in self.seconds.items()}
        object.__setattr__(self, "seconds", rows)
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
            object.__setattr__(self, "quality", _checked_quality(self.quality, self.ratios))

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

    def calibrated(self, records: Iterable[BatchRecord]) -> LatencyTable:
        """The table as an engine has it: scaled, at each ratio, by how far off its batches were in the median.

        A table holds the model's forward alone, at the speed of the machine when it was measured. An engine also pads
        and pools, and shares the machine with whoever asks; a policy that plans with the table comes too late by that.

        Args:
            records: batches that an engine ran (`Engine(on_batch=…)`). A ratio that none of them ran at is scaled as
                all of them.

        Raises:
            ValueError: no batch of the records went well, or one of them has a ratio that the table lacks.
        """
        factors: dict[int, list[float]] = {}
        for each in records:
            if not each.failed:
                expected = self.latency(each.ratio, each.size, each.length)
                factors.setdefault(each.ratio, []).append(each.seconds / expected)
        if not factors:
            raise ValueError("records has no batch that went well; record some with Engine(on_batch=…).")
        of_all = statistics.median(chain.from_iterable(factors.values()))
        by_ratio = {k: statistics.median(factors[k]) if k in factors else of_all for k in self.ratios}
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
        rows = [_along(row, self.lengths, length) for row in self.seconds[ratio]]
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[point] = found = _along(rows, self.batch_sizes, batch)
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
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"This is no latency table of format {FORMAT}. Write one with LatencyTable.save.")
        try:
            quality = content["quality"]
            return cls(
                ratios=tuple(content["ratios"]),
                batch_sizes=tuple(content["batch_sizes"]),
                lengths=tuple(content["lengths"]),
                seconds={int(k): rows for k, rows in content["seconds"].items()},
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


def _checked_axis(name: str, values: Sequence[int]) -> tuple[int, ...]:
    whole = all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values)
    if not values or not whole or any(low >= high for low, high in pairwise(values)):
        raise ValueError(f"{name} is {list(values)}; it needs integers of at least 1, ascending, each of them once.")
    return tuple(values)


def _checked_quality(quality: Mapping[int, float], ratios: Sequence[int]) -> dict[int, float]:
    unknown = sorted(set(quality) - set(ratios))
    if unknown:
        raise ValueError(f"quality has the ratios {unknown}; the table has {list(ratios)}.")
    wrong = {k: value for k, value in quality.items() if not math.isfinite(value)}
    if wrong:
        raise ValueError(f"quality is {wrong}; it has to be finite numbers, larger for better answers.")
    return {k: float(value) for k, value in sorted(quality.items())}


def _along(values: Sequence[float], axis: Sequence[int], place: int) -> float:
    """Seconds at a place of an axis, from those at its points."""
    if len(axis) == 1:
        # More work in proportion, less work no faster: neither promises too much.
        return values[0] * max(1.0, place / axis[0])
    # Below the grid a line may go through zero; the edge promises too little rather than too much.
    place = max(place, axis[0])
    cell = min(bisect_right(axis, place) - 1, len(axis) - 2)
    low, high = values[cell], values[cell + 1]
    found = low + (place - axis[cell]) / (axis[cell + 1] - axis[cell]) * (high - low)
    return max(found, high) if place > axis[-1] else found


def profile_latency(
    model: nn.Module,
    ratios: Sequence[int],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    *,
    quality: Mapping[int, float] | None = None,
    rounds: int = 5,
    min_seconds: float = 0.05,
    seed: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> LatencyTable:
    """Measure how long one forward takes here and now, at every ratio, batch size and length.

    The ratios of a batch run in turn, so that a machine that changes its speed does so for all of them. Then the
    centres of some cells of the grid are measured, to report how far off interpolation is. k = 1 is measured too if it
    is not named: it is what an idle server uses.

    Args:
        model: a model with a Variator plugin, a `SentenceTransformer` that has one, or, for the ratio 1 alone, a model
            without. Encoders run whole, causal models a prefill that asks for the last position. Put into evaluation
            mode.
        ratios: compression ratios k.
        batch_sizes: texts in a batch.
        lengths: tokens of each text.
        quality: k -> quality of the answers, from an evaluation or [`quality_from_card`].
        rounds: timed samples of each point, at least 2; the table keeps their median.
        min_seconds: seconds that a sample takes at least; short calls are repeated.
        seed: of the inputs.
        on_step: called after each timed sample.

    Raises:
        ValueError: a value is no positive integer, a length is beyond the model's positions, the plugin refuses a
            ratio, or the model takes no text.
    """
    ratios = _checked_axis("ratios", sorted({1, *ratios}))
    batch_sizes = _checked_axis("batch_sizes", sorted(set(batch_sizes)))
    lengths = _checked_axis("lengths", sorted(set(lengths)))
    if quality is not None:
        quality = _checked_quality(quality, ratios)
    inner = find_transformer(model)
    model.eval()
    measure = partial(_measure, model, inner, ratios, rounds=rounds, min_seconds=min_seconds, seed=seed, step=on_step)
    medians = {(batch, length): measure(batch, length) for batch, length in product(batch_sizes, lengths)}
    seconds = {
        k: tuple(tuple(medians[batch, length][k] for length in lengths) for batch in batch_sizes) for k in ratios
    }
    table = LatencyTable(ratios, batch_sizes, lengths, seconds)
    checks = []
    for batch, length in _centres(batch_sizes, lengths):
        for k, measured in measure(batch, length).items():
            checks.append(LatencyCheck(k, batch, length, measured, table.latency(k, batch, length)))
    return LatencyTable(
        ratios,
        batch_sizes,
        lengths,
        seconds,
        quality,
        tuple(checks),
        inner.config.name_or_path or type(inner).__name__,
        describe_environment(inner.device),
    )


def unwrap(model: nn.Module) -> nn.Module:
    """What a PeftModel was put around, with the plugin in it; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_transformer(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside of a PeftModel or a SentenceTransformer.

    Raises:
        ValueError: there is none, or it takes no text.
    """
    found = next((module for module in unwrap(model).modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no model of transformers in it. Give one that does.")
    if found.main_input_name != "input_ids":
        raise ValueError(f"{type(found).__name__} takes {found.main_input_name}; only models of text are served.")
    if is_one_of(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, found):
        raise ValueError(
            f"{type(found).__name__} is an encoder-decoder. Serve its encoder alone, e.g. a T5EncoderModel."
        )
    return found


def is_one_of(mapping: Mapping[Any, Any], model: PreTrainedModel) -> bool:
    """Whether a model has the head that an automatic class of transformers, whose mapping this is, would give it."""
    return type(model.config) in mapping and isinstance(model, mapping[type(model.config)])


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a model predicts next tokens, so that it is asked for a prefill."""
    return is_one_of(MODEL_FOR_CAUSAL_LM_MAPPING, model)


def has_plugin(model: nn.Module) -> bool:
    """Whether there is a Variator plugin whose ratio can be chosen."""
    return next(iter(plugin_layers(model)), None) is not None


@torch.no_grad()
def _measure(
    model: nn.Module,
    inner: PreTrainedModel,
    ratios: Sequence[int],
    batch: int,
    length: int,
    *,
    rounds: int,
    min_seconds: float,
    seed: int,
    step: Callable[[], object],
) -> dict[int, float]:
    """Median seconds of each ratio on a batch."""
    generator = torch.Generator().manual_seed(seed)
    task: Task = "causal" if is_causal(inner) else "encoder"
    shapes = make_lengths(batch, length, "even", generator)
    inputs = make_inputs(inner.config, task, shapes, dtype=inner.dtype, generator=generator)
    inputs = {name: value.to(inner.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    inside = unwrap(model)
    if isinstance(inside, nn.Sequential):  # what a SentenceTransformer is

        def run() -> object:
            return inside(dict(inputs))  # its modules write into what they get
    else:
        run = partial(model, **inputs)
    plain = not has_plugin(model)
    candidates = [
        Candidate(str(k), run, nullcontext if plain and k == 1 else partial(using_ratio, model, k)) for k in ratios
    ]
    samples = time_alternately(candidates, rounds, device=inner.device, min_seconds=min_seconds, on_sample=step)
    return {int(name): statistics.median(seconds) for name, seconds in samples.items()}


def _centres(batch_sizes: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Points off the grid: centres of some cells, spread over it; halfway along the axis that has more than one."""
    cells = list(product(_middles(batch_sizes), _middles(lengths)))
    points = [point for point in cells if point[0] not in batch_sizes or point[1] not in lengths]
    if len(points) <= MOST_CHECKS:
        return points
    return [points[round(index * (len(points) - 1) / (MOST_CHECKS - 1))] for index in range(MOST_CHECKS)]


def _middles(axis: Sequence[int]) -> list[int]:
    return [(low + high) // 2 for low, high in pairwise(axis)] or list(axis)


def quality_from_card(adapter: str | Path, measure: str | None = None) -> dict[int, float] | None:
    """Quality for each k as the card of a trained plugin tells it.

    A card that training has written has a row for each k, with values before and after: the latter count, and the
    base, k = 1, has 1. Cards of plugins that were measured on tasks have a column for each k, and one for the base.

    Args:
        adapter: folder of the adapter.
        measure: what is measured, or how its name begins, e.g. `cosine` (of hidden states to the base's), `agreement`
            (of predictions) or `STS-B`; `None`: `cosine`, else the first task of the card.

    Returns:
        k -> value, larger being better, or `None` if there is no card, or the card has no such measure. Rows that are
        marked "less is better", such as errors, are passed over.
    """
    path = Path(adapter, "README.md")
    if not path.is_file():
        return None
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in ModelCard.load(path).text.splitlines()
        if line.lstrip().startswith("|")
    ]
    return _after_training(rows, measure or "cosine") or _on_tasks(rows, measure or "")


def _after_training(rows: Sequence[Sequence[str]], measure: str) -> dict[int, float] | None:
    head = next((row for row in rows if row[0] == "k"), None)
    column = next((index for index, name in enumerate(head or []) if name.startswith(f"{measure},")), None)
    if column is None:
        return None
    found = {
        int(row[0]): float(row[column].rpartition("→")[2])
        for row in rows
        if row[0].isdecimal() and len(row) > column and "→" in row[column]
    }
    return {1: 1.0, **found} if found else None


def _on_tasks(rows: Sequence[Sequence[str]], measure: str) -> dict[int, float] | None:
    heads = (index for index, row in enumerate(rows) if row[1:2] == ["base"] and all(map(_RATIO.fullmatch, row[2:])))
    for head in heads:
        ratios = [1, *(int(name.removeprefix("k = ")) for name in rows[head][2:])]
        for row in rows[head + 2 :]:  # past the line under the head
            if len(row) != len(ratios) + 1:
                break
            if row[0].startswith(measure) and LESS_IS_BETTER not in row[0]:
                found = {k: value for k, value in zip(ratios, map(_number, row[1:]), strict=True) if value is not None}
                return found or None
    return None


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
