"""Policies on queues that are made up: a clock that stands still, and a table that nobody measured."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_variator.runtime import (
    POLICIES,
    FixedRatio,
    LatencyTable,
    Oracle,
    Policy,
    QueueItem,
    QueueThreshold,
    SlackFit,
)

from .models import made_table


TABLE = made_table()


def burst(count: int, slack_ms: float, length: int = 32, **fields: Any) -> list[QueueItem]:
    """Texts that all came at 0 and are due `slack_ms` later."""
    return [QueueItem(0.0, length, slack_ms / 1000, **fields) for _ in range(count)]


def milliseconds(k: int, batch: int, length: int = 32) -> float:
    return 1000 * TABLE.latency(k, batch, length)


items = st.builds(
    QueueItem,
    arrival=st.floats(0, 0.1),
    length=st.integers(1, 300),
    deadline=st.floats(-0.1, 2) | st.just(float("inf")),
    min_quality=st.none() | st.floats(0, 1.2),
    max_ratio=st.none() | st.integers(1, 10),
)
queues = st.lists(items, max_size=100).map(lambda queue: sorted(queue, key=lambda item: item.deadline))
QUALITIES = (None, {1: 1.0, 2: 0.95, 4: 0.97, 8: 0.8}, {1: 1.0, 2: 0.9})
policies = st.sampled_from(
    [FixedRatio(4), QueueThreshold()]
    + [SlackFit(made_table(quality=quality)) for quality in QUALITIES]
    + [Oracle(made_table(quality=quality)) for quality in QUALITIES]
)


@given(policy=policies, now=st.floats(0, 1), queue=queues, last=st.sampled_from([1, 2, 4, 8, 16]))
def test_every_choice_can_be_run(policy: Policy, now: float, queue: list[QueueItem], last: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        k, batch = policy.choose(now, queue, last)
        assert policy.choose(now, tuple(queue), last) == (k, batch)
    assert k in policy.ratios
    assert (1 <= batch <= len(queue)) if queue else (batch == 0 and k == 1)
    for item in queue[:batch]:
        assert item.max_ratio is None or k <= item.max_ratio
        if item.min_quality is not None and k != 1:
            assert getattr(policy, "quality", {}).get(k, -1) >= item.min_quality


@given(
    now=st.floats(0, 0.2),
    queue=st.lists(
        st.builds(QueueItem, st.just(0.0), st.integers(1, 256), st.floats(0, 0.5)), min_size=1, max_size=64
    ),
    last=st.sampled_from([1, 2, 4, 8]),
)
def test_slack_fit_meets_what_can_be_met(now: float, queue: list[QueueItem], last: int) -> None:
    """The batch ends by the deadline of everybody in it who could have been answered in time at all."""
    queue.sort(key=lambda item: item.deadline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        k, batch = SlackFit(TABLE).choose(now, queue, last)
        end = now + TABLE.latency(k, batch, max(item.length for item in queue[:batch]))
        possible = now + TABLE.latency(8, 1, queue[0].length)
    for item in queue[:batch]:
        assert item.deadline >= end - 1e-12 or item.deadline < possible or batch == 1


@pytest.mark.parametrize("count", [1, 2, 16, 64])
@pytest.mark.parametrize("better", [0, 1, 2])
def test_slack_fit_takes_the_best_ratio_that_fits(count: int, better: int) -> None:
    """Just enough for a ratio chooses it, a little less the next faster one."""
    ratio, faster = (1, 2, 4, 8)[better : better + 2]
    enough = milliseconds(ratio, count)
    assert SlackFit(TABLE).choose(0.0, burst(count, enough + 1e-6), 1) == (ratio, count)
    assert SlackFit(TABLE).choose(0.0, burst(count, enough - 0.001), 1) == (faster, count)


def test_slack_fit_goes_by_measured_quality() -> None:
    policy = SlackFit(made_table(quality={1: 1.0, 2: 0.8, 4: 0.9, 8: 0.5}))
    queue = burst(16, milliseconds(2, 16) + 1e-6)
    assert SlackFit(TABLE).choose(0.0, queue, 1) == (2, 16)
    assert policy.choose(0.0, queue, 1) == (4, 16)
    assert policy.choose(0.0, burst(4, 1e4, min_quality=0.95), 8) == (1, 4)
    assert policy.choose(0.0, burst(16, 0.1, min_quality=0.85), 1)[0] == 4
    assert policy.choose(0.0, burst(16, 0.1, min_quality=2.0), 8)[0] == 1
    # Nobody measured it: only the base is sure to be good enough.
    assert SlackFit(TABLE).choose(0.0, burst(16, 0.1, min_quality=0.1), 8)[0] == 1


def test_slack_fit_heeds_the_largest_ratio_of_a_text() -> None:
    assert SlackFit(TABLE).choose(0.0, burst(16, 0.1, max_ratio=2), 8)[0] == 2
    assert SlackFit(TABLE).choose(0.0, burst(16, 0.1, max_ratio=3), 8)[0] == 2
    mixed = burst(3, 2.0) + burst(3, 2.0, max_ratio=1)
    k, batch = SlackFit(TABLE).choose(0.0, mixed, 1)
    assert (k, batch <= 3) == (8, True)


@pytest.mark.parametrize("make", [SlackFit, Oracle])
def test_a_text_that_allows_no_ratio_of_the_table_runs_on_the_base(make: Any) -> None:
    """Also where nobody has measured the base."""
    policy = make(made_table(ratios=(2, 4), quality={2: 0.9, 4: 0.8}))
    for limits in ({"max_ratio": 1}, {"min_quality": 0.95}):
        assert policy.choose(0.0, [*burst(3, 1.0, **limits), *burst(2, 1.0)], 4) == (1, 3)
    assert policy.choose(0.0, burst(2, 1e4, max_ratio=3), 4) == (2, 2)


@pytest.mark.parametrize("make", [SlackFit, Oracle])
def test_padding_is_not_paid_for(make: Any) -> None:
    """Short texts run without the long ones, unless a call costs more than their padding."""
    queue = burst(4, 1e6, length=16) + burst(4, 1e6, length=256)
    assert make(TABLE).choose(0.0, queue, 1) == (1, 4)
    assert make(TABLE).choose(0.0, queue[4:], 1) == (1, 4)
    flat = LatencyTable((1, 2), (1, 64), (8, 256), {1: ((0.1, 0.11),) * 2, 2: ((0.1, 0.11),) * 2})
    assert make(flat).choose(0.0, queue, 1) == (1, 8)


@pytest.mark.parametrize(
    "make", [lambda: FixedRatio(4), QueueThreshold, lambda: SlackFit(TABLE), lambda: Oracle(TABLE)]
)
def test_any_sequence_will_do(make: Any) -> None:
    queue = [*burst(3, -50.0), *burst(5, 30.0), *burst(2, 40.0, max_ratio=2)]
    assert make().choose(0.0, deque(queue), 4) == make().choose(0.0, queue, 4)


def test_a_text_without_a_token_is_run() -> None:
    """As a recorded trace may have one."""
    for make in (SlackFit, Oracle):
        assert make(TABLE).choose(0.0, burst(1, 1e6, length=0), 1) == (1, 1)
        assert make(TABLE).choose(0.0, burst(1, 1e6, length=0) + burst(2, 1e6, length=16), 1)[1] >= 1


def test_idle_is_the_base() -> None:
    for last in (1, 2, 8):
        assert SlackFit(TABLE).choose(5.0, [], last) == (1, 0)
        assert SlackFit(TABLE).choose(0.0, burst(1, milliseconds(1, 1) + 1e-6), last) == (1, 1)


def test_hysteresis() -> None:
    queue = burst(16, 1.05 * milliseconds(2, 16))
    policy = SlackFit(TABLE, hysteresis=0.1)
    assert policy.choose(0.0, queue, 2)[0] == 2
    assert policy.choose(0.0, queue, 1)[0] == 2
    assert policy.choose(0.0, queue, 4)[0] == 4  # not enough room to go back
    assert policy.choose(0.0, burst(16, 1.15 * milliseconds(2, 16)), 4)[0] == 2
    assert SlackFit(TABLE, hysteresis=0.0).choose(0.0, queue, 4)[0] == 2


def test_more_waiting_means_a_larger_ratio() -> None:
    chosen = [SlackFit(TABLE).choose(0.0, burst(count, 20.0), 1)[0] for count in (1, 8, 64, 100, 150, 400)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[-1] == 8


def test_an_urgent_text_does_not_make_the_patient_ones_worse() -> None:
    queue = [*burst(1, milliseconds(1, 1) + 1e-6), *burst(30, 1000.0)]
    assert SlackFit(TABLE).choose(0.0, queue, 1) == (1, 1)


def test_late_texts_limit_nothing() -> None:
    queue = [*burst(4, -50.0), *burst(4, milliseconds(2, 8) + 1e-6)]
    assert SlackFit(TABLE).choose(0.0, queue, 1) == (2, 8)
    assert SlackFit(TABLE).choose(0.0, burst(70, -50.0), 1) == (8, 64)


def test_the_reserve_is_left() -> None:
    queue = burst(1, milliseconds(1, 1) + 2.5)
    assert SlackFit(TABLE, reserve_ms=2).choose(0.0, queue, 1)[0] == 1
    assert SlackFit(TABLE, reserve_ms=3).choose(0.0, queue, 1)[0] > 1


def test_texts_that_keep_coming_are_left_some_time() -> None:
    """A batch that takes nearly all of the slack would make those late that come while it runs."""
    slack = milliseconds(1, 16, 32) + 0.5
    assert SlackFit(TABLE).choose(0.0, burst(16, slack), 1)[0] == 1
    streaming = [QueueItem(-0.0001 * (15 - i), 32, slack / 1000 + 0.0001 * i) for i in range(16)]
    assert SlackFit(TABLE).choose(0.0, streaming, 1)[0] > 1
    at_once = [QueueItem(arrival, 16, math.inf) for arrival in (0.0, 5e-324)]  # a rate beyond every number
    assert SlackFit(TABLE).choose(0.0, at_once, 1) == (1, 2)


@pytest.mark.parametrize("policy", [SlackFit, Oracle])
def test_batches_and_lengths_beyond_the_table_are_run_whole(policy: Any) -> None:
    table = made_table(batch_sizes=(1, 2), lengths=(8, 16))
    with pytest.warns(UserWarning, match="extrapolated"):
        assert policy(table).choose(0.0, burst(20, 1e6, length=1000), 1) == (1, 20)


def test_fixed_ratio() -> None:
    assert FixedRatio(4, max_batch=3).choose(0.0, burst(5, 1), 1) == (4, 3)
    assert FixedRatio(4).choose(0.0, burst(2, 1, max_ratio=3) + burst(2, 1), 1) == (1, 2)
    assert FixedRatio(4).choose(0.0, burst(2, 1, min_quality=0.5), 1) == (1, 2)


def test_queue_threshold() -> None:
    policy = QueueThreshold({2: 4, 8: 10}, hysteresis=0.25)
    ratios = [policy.choose(0.0, burst(count, 1), 1)[0] for count in (1, 3, 4, 9, 10, 30)]
    assert ratios == [1, 1, 2, 2, 8, 8]
    assert [policy.choose(0.0, burst(count, 1), 8)[0] for count in (2, 3, 7, 8)] == [1, 2, 2, 8]
    assert policy.choose(0.0, burst(30, 1, max_ratio=4), 1)[0] == 2


def test_the_oracle_sees_what_comes() -> None:
    slack = milliseconds(1, 8) + 1
    queue = burst(8, slack)
    assert Oracle(TABLE, []).choose(0.0, queue, 1) == (1, 8)
    due = (milliseconds(8, 8) + milliseconds(8, 40)) / 1000 + 1e-9
    soon = [QueueItem(0.0005, 32, due) for _ in range(40)]
    assert Oracle(TABLE, soon).choose(0.0, queue, 1)[0] == 8
    later = [QueueItem(1.0, 32, 1.1) for _ in range(40)]
    assert Oracle(TABLE, later).choose(0.0, queue, 1) == (1, 8)
    with pytest.raises(ValueError, match="sorted"):
        Oracle(TABLE, [*later, *soon])


def test_policies_are_chosen_by_name() -> None:
    assert set(POLICIES) == {"fixed", "threshold", "slack-fit", "oracle"}
    assert all(cls.name == name for name, cls in POLICIES.items())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FixedRatio(0), "ratio"),
        (lambda: FixedRatio(True), "ratio"),
        (lambda: FixedRatio(2, max_batch=0), "max_batch"),
        (lambda: QueueThreshold({2: 8, 4: 8}), "thresholds"),
        (lambda: QueueThreshold({2: 0}), "thresholds"),
        (lambda: QueueThreshold(hysteresis=1.0), "hysteresis"),
        (lambda: SlackFit(TABLE, hysteresis=-0.1), "hysteresis"),
        (lambda: SlackFit(TABLE, max_batch=0), "max_batch"),
        (lambda: SlackFit(TABLE, reserve_ms=float("nan")), "reserve_ms"),
        (lambda: SlackFit(TABLE, reserve_ms=None), "reserve_ms=None has to be a number"),
        (lambda: SlackFit(TABLE, hysteresis="x"), "hysteresis='x' has to be a number"),
        (lambda: QueueThreshold(hysteresis=None), "hysteresis=None has to be a number"),
    ],
)
def test_wrong_options_are_refused(make: Any, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        make()


@pytest.mark.parametrize("make", [SlackFit, Oracle])
@pytest.mark.parametrize("table", [None, "latency.json"])
def test_what_is_no_table_is_told(make: Any, table: Any) -> None:
    with pytest.raises(TypeError, match="LatencyTable"):
        make(table)


def test_items_of_others_will_do() -> None:
    class Item:
        arrival, length, deadline, min_quality, max_ratio = 0.0, 16, 1.0, None, None

    queue: Sequence[Any] = [Item(), Item()]
    for policy in (FixedRatio(1), QueueThreshold(), SlackFit(TABLE), Oracle(TABLE)):
        assert policy.choose(0.0, queue, 1) == (1, 2)
