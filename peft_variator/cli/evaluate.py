"""`peft-variator evaluate`: a plugin on the user's own data, quality beside speed, and whether it pays."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from transformers import PreTrainedModel

from ..profiling import (
    Candidate,
    count_flops,
    describe_environment,
    find_device,
    num_threads,
    share_weights,
    speedup,
    time_alternately,
    was_busy,
)
from ..training import load_plugin
from ..training.data import is_plain_text
from ..training.evaluation import measure_ratios
from ..training.loss_masks import CAUSAL, EXAMPLES, Prediction, prediction_of, stacks_of
from .bench import warn_about_load
from .console import Reporter, option_words
from .examples import Batch, load_evaluation_data, warn_about_unreadable
from .saved_plugin import SavedPlugin, open_plugin


__all__ = ["EvaluateJob", "Evaluation", "RatioResult", "evaluate"]

# Fewer texts than these give figures that others would change visibly.
ENOUGH_TEXTS = 32
# Below this share of a batch, padding is not worth a word.
LEAST_PADDING = 0.1


@dataclass(frozen=True)
class EvaluateJob:
    """What is evaluated; each field is an option of the command.

    Raises:
        ValueError: a field is out of range.
    """

    adapter: str
    data: list[str]
    base: str | None = None
    ratio: list[int] | None = None
    min_cosine: float | None = None
    min_agreement: float | None = None
    max_nll: float | None = None
    examples: int = 256
    batch_size: int = 8
    rounds: int = 5
    min_seconds: float = 0.2
    text_column: str = "text"
    split: str = "train"
    dtype: str = "float32"
    threads: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("batch_size", 1), ("rounds", 2)):
            if getattr(self, name) < least:
                value = getattr(self, name)
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it has to be at least {least}.")
        if not 0 <= self.min_seconds < math.inf:
            raise ValueError(f"--min-seconds is {self.min_seconds}; it has to be 0 or more, and finite.")
        for name, low, high in (("min_cosine", -1, 1), ("min_agreement", 0, 1), ("max_nll", 0, math.inf)):
            bound = getattr(self, name)
            if bound is not None and not low <= bound <= high:
                raise ValueError(f"--{name.replace('_', '-')} is {bound}; it has to be between {low} and {high}.")

    @property
    def bounds(self) -> dict[str, float]:
        """What is asked of each measure, by its name."""
        asked = {"cosine": self.min_cosine, "agreement": self.min_agreement, "nll": self.max_nll}
        return {name: bound for name, bound in asked.items() if bound is not None}


@dataclass(frozen=True)
class RatioResult:
    """One compression ratio.

    Args:
        ratio: k.
        quality: measures by name: `cosine` of the last hidden states to the base's, mean over tokens (of an
            encoder–decoder `encoder_cosine` and `decoder_cosine`); `embedding_cosine` of their means over each text;
            `agreement`, the share of predictions that are the base's, or of heads that give a number `score_error`,
            how far it is from the base's; `nll` of a token, in nats.
        flops_saved: share of the base's operations that are not done.
        seconds: seconds for the timed batches, one sample a round.
        speedup: how many times faster than the base, `low`, `median` and `high` quartile over the rounds.
        holds: whether it is as good as asked; `None`: nothing was asked.
    """

    ratio: int
    quality: dict[str, float]
    flops_saved: float
    seconds: list[float]
    speedup: dict[str, float]
    holds: bool | None


@dataclass(frozen=True)
class Evaluation:
    """A plugin on a user's data.

    Args:
        adapter: folder or Hub name of the plugin.
        base: folder or Hub name of the base.
        model_class: class of the base.
        data: what was read.
        examples: number of texts or images that quality was measured on.
        tokens: `min`, `median` and `max` of the tokens of a text, as the model got it; `None` for images.
        cut: texts that were longer than the model can read, and cut.
        timed_examples: how many of the examples were timed.
        padding: share of the timed batches' tokens that is padding; `None` for images.
        batch_size: examples in a batch.
        environment: machine and versions.
        base_seconds: the base's seconds for the timed batches, one sample a round.
        base_quality: `nll` of the base, where the model has one.
        bounds: what was asked of each measure.
        ratios: the results, by ascending k.
        largest_ratio: the largest k that is as good as asked; `None`: none is, or nothing was asked.
        pays: whether a k that is as good as asked is faster than the base in three of four rounds; where nothing was
            asked, whether any is.
        verdict: the same in one line.
        command: what was typed.
    """

    adapter: str
    base: str
    model_class: str
    data: list[str]
    examples: int
    tokens: dict[str, float] | None
    cut: int
    timed_examples: int
    padding: float | None
    batch_size: int
    environment: dict[str, Any]
    base_seconds: list[float]
    base_quality: dict[str, float]
    bounds: dict[str, float]
    ratios: list[RatioResult]
    largest_ratio: int | None
    pays: bool
    verdict: str
    command: str


def evaluate(job: EvaluateJob, reporter: Reporter) -> None:
    """Evaluate a plugin and tell.

    Raises:
        OSError: the plugin, its base or the data are not there.
        ValueError: the adapter is no plugin, the model has no such measure, or the data holds no text.
    """
    reporter.check()
    saved, device = open_plugin(job.adapter, job.base), find_device(job.device)
    with num_threads(job.threads):
        evaluation = _evaluate(job, saved, device, reporter)
    reporter.write_json(json.dumps(asdict(evaluation), indent=2))
    _show(evaluation, reporter)


def _evaluate(job: EvaluateJob, saved: SavedPlugin, device: torch.device, reporter: Reporter) -> Evaluation:
    base: Any = saved.load_base(getattr(torch, job.dtype))[0].to(device)
    prediction = prediction_of(base)
    _check_bounds(job, base, prediction)
    examples = load_evaluation_data(
        saved.base,
        base,
        job.data,
        column=job.text_column,
        split=job.split,
        wanted=job.examples,
        batch_size=job.batch_size,
        seed=job.seed,
    )
    warn_about_unreadable(examples.unreadable, examples.count, reporter)
    ratios = sorted(set(job.ratio or saved.ratios))
    plugin = load_plugin(share_weights(base), saved.name, is_trainable=False).to(base.dtype).eval()
    for ratio in ratios:
        plugin.set_compression_ratio(ratio)  # raises for one that is none, before anything is measured
    environment = describe_environment(device)
    steps = len(examples.quality) + (1 + len(ratios)) * job.rounds
    columns = [TextColumn("{task.description}"), *Progress.get_default_columns()[1:2]]
    with reporter.progress(*columns, MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task(f"Evaluating {saved.name} on {device}", total=steps)
        advance = partial(progress.advance, bar)
        quality = measure_ratios(plugin, examples.quality, ratios, on_batch=advance)
        seconds = _time(base, plugin, examples.timed, ratios, job, device, advance)
    flops = {ratio: _flops(base if ratio is None else plugin, examples.timed, ratio) for ratio in (None, *ratios)}
    results = [
        RatioResult(
            ratio,
            quality[ratio],
            1 - flops[ratio] / flops[None],
            seconds[ratio],
            asdict(speedup(seconds[None], seconds[ratio])),
            _holds(quality[ratio], job.bounds) if job.bounds else None,
        )
        for ratio in ratios
    ]
    base_quality = {name: value for name, value in quality[1].items() if name == "nll"}
    largest, pays, verdict = judge(results, job.bounds, base_quality)
    return Evaluation(
        adapter=saved.name,
        base=saved.base,
        model_class=type(base).__name__,
        data=job.data,
        examples=examples.count,
        tokens=_spread_of(examples.lengths),
        cut=examples.cut,
        timed_examples=min(examples.count, len(examples.timed) * job.batch_size),
        padding=_padding_of(examples.timed),
        batch_size=job.batch_size,
        environment=environment,
        base_seconds=seconds[None],
        base_quality=base_quality,
        bounds=job.bounds,
        ratios=results,
        largest_ratio=largest,
        pays=pays,
        verdict=verdict,
        command=command_line(job),
    )


def _check_bounds(job: EvaluateJob, base: PreTrainedModel, prediction: Prediction | None) -> None:
    has_text_head = prediction is CAUSAL or (prediction is not None and len(stacks_of(base)) > 1)
    name = type(base).__name__
    if base.main_input_name not in ("input_ids", "pixel_values"):
        raise ValueError(
            f"{name} takes {base.main_input_name}, and only texts and images are read here. Measure it on inputs of "
            "your own with peft_variator.profiling.time_alternately, as examples/real_models/speed.py does."
        )
    if job.min_agreement is not None and prediction is None:
        raise ValueError(f"--min-agreement needs a model that predicts, and {name} has no head. Use --min-cosine.")
    if job.min_agreement is not None and prediction is EXAMPLES and _gives_a_number(base):
        raise ValueError(f"--min-agreement needs classes, and this {name} gives a number. Use --min-cosine.")
    if job.max_nll is not None and not has_text_head:
        raise ValueError(
            f"--max-nll needs a model that predicts text, and {name} is none. Use --min-cosine"
            + (" or --min-agreement." if prediction else ".")
        )
    if prediction is None and len(stacks_of(base)) > 1:
        raise ValueError(f"{name} has a decoder and no head, so nothing tells what it is to predict.")


def _gives_a_number(base: PreTrainedModel) -> bool:
    """Whether a head for whole examples gives a score, as of a reranker."""
    return base.config.problem_type == "regression" or base.config.num_labels == 1


# The clock


@torch.inference_mode()
def _time(
    base: nn.Module,
    plugin: PeftModel,
    batches: Sequence[Batch],
    ratios: Sequence[int],
    job: EvaluateJob,
    device: torch.device,
    on_sample: Callable[[], object],
) -> dict[int | None, list[float]]:
    """Seconds for all batches, by ratio; `None`: of the base, in whose modules no plugin ever was."""

    def run(model: nn.Module) -> None:
        for batch in batches:
            model(**batch)

    @contextmanager
    def at(ratio: int) -> Iterator[None]:
        plugin.set_compression_ratio(ratio)
        yield

    names: dict[int | None, str] = {None: "base"} | {ratio: f"k = {ratio}" for ratio in ratios}
    candidates = [Candidate("base", partial(run, base))]
    candidates += [Candidate(f"k = {ratio}", partial(run, plugin), partial(at, ratio)) for ratio in ratios]
    samples = time_alternately(candidates, job.rounds, device=device, min_seconds=job.min_seconds, on_sample=on_sample)
    return {ratio: samples[name] for ratio, name in names.items()}


def _flops(model: Any, batches: Sequence[Batch], ratio: int | None) -> int:
    if ratio is not None:
        model.set_compression_ratio(ratio)
    return sum(count_flops(model, batch) for batch in batches)


# The verdict


def _holds(quality: Mapping[str, float], bounds: Mapping[str, float]) -> bool:
    """Whether every measure is as good as asked; of an encoder–decoder both cosines."""
    for name, bound in bounds.items():
        found = [value for key, value in quality.items() if key in (name, f"encoder_{name}", f"decoder_{name}")]
        if not found or not all(value <= bound if name == "nll" else value >= bound for value in found):
            return False
    return True


def judge(
    results: Sequence[RatioResult],
    bounds: Mapping[str, float],
    base_quality: Mapping[str, float] = {},  # noqa: B006
) -> tuple[int | None, bool, str]:
    """The largest ratio that is as good as asked, whether a plugin pays, and both in a line.

    Args:
        results: what was measured, at least one.
        bounds: what is asked of each measure; empty: nothing.
        base_quality: the base's own `nll`, where it has one.

    Returns:
        tuple: that ratio (`None`: none is, or nothing was asked), whether it or a smaller one that is as good as asked
        is faster than the base in three of four rounds (where nothing was asked: whether any is), and the verdict.
    """
    paying = [each for each in results if each.holds is not False and each.speedup["low"] > 1]
    fastest = max(paying or results, key=lambda each: each.speedup["median"])
    if not bounds:
        if not paying:
            return None, False, f"It does not pay: no k is faster than the base; {_described(fastest)}."
        return (
            None,
            True,
            (
                f"It pays if the quality is enough for you: {_described(fastest)}. "
                f"--{_option(fastest.quality)} X names the largest k that keeps X."
            ),
        )
    asked = " and ".join(f"{name} {'≤' if name == 'nll' else '≥'} {bound:g}" for name, bound in bounds.items())
    holding = [each for each in results if each.holds]
    if not holding and base_quality.get("nll", -math.inf) > bounds.get("nll", math.inf):
        told = f"and the base does not either: its nll is {base_quality['nll']:.4f}"
        return None, False, f"It does not pay: no k keeps {asked}, {told}. Allow a larger one."
    if not holding:
        return None, False, f"It does not pay: no k keeps {asked}. The smallest measured: {_described(results[0])}."
    largest = max(holding, key=lambda each: each.ratio)
    if largest in paying:
        verdict = f"It pays: {_described(largest)}. It is the largest k measured that keeps {asked}."
    elif paying:
        verdict = (
            f"It pays: {_described(fastest)}. It keeps {asked}; so does k = {largest.ratio}, no faster than the base."
        )
    else:
        verdict = f"It does not pay: no k that keeps {asked} is faster than the base; {_described(largest)}."
    return largest.ratio, bool(paying), verdict


def _option(quality: Mapping[str, float]) -> str:
    return "min-agreement" if "agreement" in quality else "min-cosine"


def _described(result: RatioResult) -> str:
    spread = result.speedup
    quality = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.quality.items())
    return f"k = {result.ratio} is {spread['median']:.2f}× ({spread['low']:.2f}–{spread['high']:.2f}) with {quality}"


def _padding_of(batches: Sequence[Batch]) -> float | None:
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    tokens = sum(mask.numel() for mask in masks)
    return 1 - sum(int(mask.ne(0).sum()) for mask in masks) / tokens if tokens else None


def _spread_of(lengths: Sequence[int]) -> dict[str, float] | None:
    return {"min": min(lengths), "median": median(lengths), "max": max(lengths)} if lengths else None


def _show(found: Evaluation, reporter: Reporter) -> None:
    measures = list(found.ratios[0].quality)
    kind = "image" if found.tokens is None else "text"
    texts = kind if found.examples == 1 else f"{kind}s"
    head = ["FLOPs saved", "speed-up", "quartiles", "ms a batch"] + (["as asked"] if found.bounds else [])
    rows = [["", *(name.replace("_", " ") for name in measures), *head]]
    batches = math.ceil(found.timed_examples / found.batch_size)
    base = [f"{found.base_quality[name]:.4f}" if name in found.base_quality else "" for name in measures]
    unasked = [""] * bool(found.bounds)
    rows.append(["base", *base, "", "", "", f"{1000 * median(found.base_seconds) / batches:.1f}", *unasked])
    for each in found.ratios:
        spread = each.speedup
        rows.append(
            [
                f"k = {each.ratio}",
                *(f"{each.quality[name]:.4f}" for name in measures),
                f"{each.flops_saved:.1%}",
                f"{spread['median']:.2f}×",
                f"{spread['low']:.2f}–{spread['high']:.2f}",
                f"{1000 * median(each.seconds) / batches:.1f}",
                *(["yes" if each.holds else "no"] if found.bounds else []),
            ]
        )
    lines = []
    if found.tokens is not None and (plain := [name for name in found.data if is_plain_text(name)]):
        lines.append(f"Each line of {', '.join(plain)} was one text; of a table each row would be.")
    if found.tokens is not None:
        tokens = found.tokens
        cut = f"; {found.cut} were cut, as the model reads no more" if found.cut else ""
        lines.append(f"Tokens of a text: {tokens['min']:g} to {tokens['max']:g}, median {tokens['median']:g}{cut}.")
    lines.append(
        f"Quality on {found.examples} {texts}, time on {found.timed_examples} in batches of {found.batch_size}; base "
        "and plugin ran in turn in one process."
    )
    if found.padding is not None and found.padding >= LEAST_PADDING:
        lines.append(
            f"Padding is {found.padding:.0%} of the base's tokens in these batches, and part of what is saved: "
            "batches of texts of like length save it without a plugin."
        )
    reporter.show_figures(f"{found.adapter} on {', '.join(found.data)}", rows, lines)
    warn_about_load(found.environment, reporter)
    if found.examples < ENOUGH_TEXTS:
        few = f"{found.examples} {texts} are few" if found.examples > 1 else f"One {texts} is little"
        reporter.warn(f"{few}: others would give other figures. Give more --data.")
    busy = " The machine was busy: run it again before you believe it." if was_busy(found.environment) else ""
    reporter.say(f"{found.verdict}{busy}")


def command_line(job: EvaluateJob) -> str:
    """The command line of a job: what differs from the defaults, and the device, whose default depends."""
    return shlex.join(["peft-variator", "evaluate", job.adapter, *option_words(job, {"device"}, {"adapter"})])
