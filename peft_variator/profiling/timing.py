"""Timing several callables side by side, so that a machine that changes its speed does so for all; and on what."""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..version import __version__


__all__ = [
    "Candidate",
    "Spread",
    "check_sampling",
    "describe_environment",
    "make_training_step",
    "num_threads",
    "speedup",
    "time_alternately",
    "was_busy",
]

_PACKAGES = ("peft", "torch", "transformers")
_MOMENT = 0.3  # seconds
_MOST_IN_USE = 0.15


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles of at least two `values`, interpolated as NumPy does by default."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Args:
        name: shown in reports.
        run: the work.
        setting: entered before and left after each sample, outside the measured time: where a switch is thrown.
    """

    name: str
    run: Callable[[], object]
    setting: Callable[[], AbstractContextManager[object]] = nullcontext


@contextmanager
def num_threads(threads: int | None) -> Iterator[None]:
    """Let torch use `threads` CPU threads inside the block; `None` leaves the number alone.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1.")
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_sampling(rounds: int, min_seconds: float) -> None:
    """Check how samples are to be taken.

    Args:
        rounds: samples of each candidate.
        min_seconds: seconds that a sample takes at least.

    Raises:
        ValueError: fewer than 2 rounds, or a `min_seconds` that is no time.
    """
    if not 0 <= min_seconds < math.inf:
        raise ValueError(f"min_seconds is {min_seconds}; it must be a number of seconds, 0 or more.")
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; quartiles need at least 2.")


def time_alternately(
    candidates: Sequence[Candidate],
    rounds: int,
    *,
    device: torch.device,
    min_seconds: float = 0.2,
    on_sample: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call of each candidate, one sample a round, all candidates in every round.

    Every second round goes through the candidates backwards, so that a steady drift within a round favours none of
    them. A sample is the mean over as many calls in a row as fill `min_seconds` (one call if it takes longer). Before
    the first round each candidate runs twice: once to warm up and once to find that number. Garbage collection is off
    while the clock runs, and the device is waited for before the clock starts and before it stops.

    Args:
        candidates: what to time; names must differ.
        rounds: samples of each candidate, at least 2.
        device: where the work runs; anything but the CPU is synchronised.
        min_seconds: seconds that a sample takes at least.
        on_sample: called after each sample, for progress: `rounds * len(candidates)` times.

    Returns:
        For each name the samples in the order of the rounds, in seconds a call.

    Raises:
        ValueError: fewer than 2 rounds, two candidates of one name, or a `min_seconds` that is no time.
    """
    check_sampling(rounds, min_seconds)
    samples: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    if len(samples) != len(candidates):
        raise ValueError(f"Candidates need names of their own, not {[candidate.name for candidate in candidates]}.")
    with _garbage_collection_off():
        calls = {candidate.name: _calls_to_fill(candidate, min_seconds, device) for candidate in candidates}
        for index in range(rounds):
            for candidate in reversed(candidates) if index % 2 else candidates:
                samples[candidate.name].append(_sample(candidate, calls[candidate.name], device))
                on_sample()
    return samples


def speedup(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster `other` is than `base`: quartiles of the quotients round by round.

    Quotients within a round are free of what changes from round to round (clock rate, other work on the machine).

    Args:
        base: seconds of the base, one a round.
        other: seconds of the other in the same rounds.
    """
    return Spread.of([slow / fast for slow, fast in zip(base, other, strict=True)])


def make_training_step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    """Forward, backward and an AdamW step on what is trainable, to be timed.

    Args:
        model: what is trained; it is put into training mode.
        loss: the scalar loss of a model.
    """
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _calls_to_fill(candidate: Candidate, min_seconds: float, device: torch.device) -> int:
    _sample(candidate, 1, device)
    return max(1, math.ceil(min_seconds / _sample(candidate, 1, device)))


def _sample(candidate: Candidate, calls: int, device: torch.device) -> float:
    """Mean seconds of `calls` calls in a row."""
    # With automatic collection off all that the last sample made is young, so this is complete, and quick.
    gc.collect(0)
    with candidate.setting():
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            candidate.run()
        _synchronize(device)
        return (time.perf_counter() - start) / calls


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_environment(device: torch.device) -> dict[str, str | int | float]:
    """Machine and versions, ready for JSON.

    `threads` is the number of CPU threads that torch uses now. `cpu_in_use` is the share of all cores that was busy
    while this process slept for a moment: with something else. `load_average` is the number of processes that wanted
    to run in the last minute, this one among them; Windows has none.

    Args:
        device: where the work runs.
    """
    facts: dict[str, str | int | float] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_in_use": round(psutil.cpu_percent(interval=_MOMENT) / 100, 2),
    }
    if sys.platform != "win32":
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts | {"peft-variator": __version__} | {package: version(package) for package in _PACKAGES}


def was_busy(environment: Mapping[str, Any]) -> bool:
    """Whether something else ran when a measurement began, so that its times are not to be trusted.

    Args:
        environment: what `describe_environment` gave then.
    """
    return bool(environment["device"] == "cpu" and environment.get("cpu_in_use", 0) > _MOST_IN_USE)


def _cpu_name() -> str:
    """The model's name where Linux tells it, else what Python knows of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
