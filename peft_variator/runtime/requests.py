"""Calls to an engine: what they may ask for, the texts of each that wait, and how its answers come together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

from .latency import is_whole
from .tasks import Encoded, Task


__all__ = [
    "EngineClosed",
    "Limits",
    "QueueFull",
    "QueuedText",
    "Request",
    "check_limits",
    "checked_query",
    "checked_slo",
    "checked_texts",
]


logger = logging.getLogger(__name__)


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


def check_limits(min_quality: Any, max_ratio: Any) -> None:
    """Check what a call asks of the ratio.

    Raises:
        TypeError: a limit is not of its type.
        ValueError: it is out of range.
    """
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
