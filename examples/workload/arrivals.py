"""When texts come and how long they are: two recorded traces, and two made-up processes, at any mean rate."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from peft_variator.runtime import QueueItem


__all__ = ["KINDS", "Trace", "lengths_of", "make_items", "read_trace"]

KINDS = ("conv", "code", "poisson", "gamma")
GAMMA_SHAPE = 0.25  # a coefficient of variation of 2: bursts, and gaps between them

Trace = Sequence[tuple[float, int]]
"""Seconds since the first request, and tokens of its context."""


def read_trace(path: Path) -> list[tuple[float, int]]:
    """A trace of Azure's LLM inference service, by arrival.

    Args:
        path: `conv.csv` or `code.csv`, with the columns `TIMESTAMP` and `ContextTokens`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            (datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(), int(row["ContextTokens"]))
            for row in csv.DictReader(file)
        ]
    rows.sort()
    return [(moment - rows[0][0], tokens) for moment, tokens in rows]


def lengths_of(trace: Trace, share: int, shortest: int, longest: int) -> list[int]:
    """Tokens of each text: 1/`share` of a context, within bounds. Small models read less than those of the traces."""
    return [min(max(tokens // share, shortest), longest) for _, tokens in trace]


def make_items(
    kind: str, rate: float, seconds: float, lengths: Sequence[int], slo_ms: float, trace: Trace = (), seed: int = 0
) -> list[QueueItem]:
    """Texts that come for so long at a mean rate.

    A trace is played faster or slower until its mean rate is the one asked for, and again from its start when it ends;
    its order, its lengths and its burstiness stay what they are.

    Args:
        kind: one of `KINDS`.
        rate: texts a second.
        seconds: how long.
        lengths: tokens of each text of the trace, in its order; the made-up processes draw from them.
        slo_ms: milliseconds from arrival to deadline.
        trace: what `read_trace` gives, for `conv` and `code`.
        seed: of what is drawn.
    """
    if kind in ("conv", "code"):
        moments = [moment for moment, _ in trace]
        span = moments[-1] * len(moments) / (len(moments) - 1)  # up to where the next request would come
        squeeze = len(moments) / span / rate
        rounds = int(seconds / (span * squeeze)) + 1
        pairs = [
            ((turn * span + moment) * squeeze, length)
            for turn in range(rounds)
            for moment, length in zip(moments, lengths, strict=True)
        ]
        pairs = [pair for pair in pairs if pair[0] < seconds]
    else:
        drawn = random.Random(f"{kind}-{seed}")
        shape = 1.0 if kind == "poisson" else GAMMA_SHAPE
        pairs, now = [], 0.0
        while (now := now + drawn.gammavariate(shape, 1 / (shape * rate))) < seconds:
            pairs.append((now, drawn.choice(lengths)))
    return [QueueItem(moment, length, moment + slo_ms / 1000) for moment, length in pairs]
