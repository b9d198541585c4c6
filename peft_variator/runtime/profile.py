"""How long a model takes at each ratio, measured here and now, and how good its answers are, read off its card."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from ..models import Task, on_device
from ..profiling import Candidate, describe_environment, make_inputs, make_lengths, time_alternately
from ..tuners.variator import using_ratio
from .latency import LatencyCheck, LatencyTable, checked_axis, checked_quality
from .tasks import find_transformer, has_plugin, is_causal, unwrap


__all__ = ["name_of", "profile_latency", "quality_from_card"]

MOST_CHECKS = 4  # cells whose centres are measured beside the grid, for each ratio
LESS_IS_BETTER = "less is better"  # how a row of a card is marked whose figures are no quality
_RATIO = re.compile(r"k = \d+")  # the title of a column in a card


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
        quality: k -> quality of the answers, from an evaluation or [`quality_from_card`]; that of ratios that are not
            measured is left out.
        rounds: timed samples of each point, at least 2; the table keeps their median.
        min_seconds: seconds that a sample takes at least; short calls are repeated.
        seed: of the inputs.
        on_step: called after each timed sample.

    Raises:
        ValueError: a value is no positive integer, a length is beyond the model's positions, the plugin refuses a
            ratio, or the model takes no text.
    """
    ratios = checked_axis("ratios", sorted({1, *ratios}))
    batch_sizes = checked_axis("batch_sizes", sorted(set(batch_sizes)))
    lengths = checked_axis("lengths", sorted(set(lengths)))
    if quality is not None:
        quality = checked_quality(quality, sorted({*ratios, *quality}))
        quality = {k: value for k, value in quality.items() if k in ratios}  # a card knows others, too
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
    environment = describe_environment(inner.device)
    return replace(table, quality=quality, checks=tuple(checks), model=name_of(inner), environment=environment)


def name_of(model: PreTrainedModel) -> str:
    """What a model was loaded from, or its class where it was made."""
    return model.config.name_or_path or type(model).__name__


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
    inputs = on_device(make_inputs(inner.config, task, shapes, dtype=inner.dtype, generator=generator), inner.device)
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
