"""Timing with a clock of our own, so that nothing depends on the machine."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peft_variator.profiling import Candidate, Spread, num_threads, speedup, time_alternately, timing


CPU = torch.device("cpu")


class Clock:
    """Time that passes only when a candidate runs."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.log = []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def candidate(self, name, *seconds, setting_seconds=0.0):
        """A candidate whose calls take `seconds` in turn, the last of them for ever after."""
        remaining = list(seconds)

        def run():
            self.log.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        @contextmanager
        def setting():
            self.now += setting_seconds
            yield
            self.now += setting_seconds

        return Candidate(name, run, setting)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_rounds_go_forwards_and_backwards(clock):
    names = "abc"
    candidates = [clock.candidate(name, 1.0) for name in names]
    time_alternately(candidates, 3, device=CPU)
    assert "".join(clock.log) == "aabbcc" + "abc" + "cba" + "abc"


def test_the_warm_up_is_not_a_sample(clock):
    samples = time_alternately([clock.candidate("a", 9.0, 9.0, 1.0, 2.0, 3.0)], 3, device=CPU)
    assert samples == {"a": [1.0, 2.0, 3.0]}


def test_short_calls_are_repeated_to_fill_a_sample(clock):
    samples = time_alternately([clock.candidate("a", 5.0, 0.03)], 2, device=CPU, min_seconds=0.1)
    assert samples == {"a": pytest.approx([0.03, 0.03])}
    assert len(clock.log) == 2 + 2 * 4


def test_the_setting_costs_nothing(clock):
    samples = time_alternately([clock.candidate("a", 1.0, setting_seconds=7.0)], 2, device=CPU)
    assert samples == {"a": [1.0, 1.0]}


def test_progress_is_told(clock):
    told = []
    time_alternately([clock.candidate(n, 1.0) for n in "ab"], 2, device=CPU, on_sample=lambda: told.append(1))
    assert len(told) == 4


def test_garbage_collection_is_off_while_the_clock_runs_and_on_again_after_an_error():
    seen = []
    time_alternately([Candidate("a", lambda: seen.append(gc.isenabled()))], 2, device=CPU, min_seconds=0)
    assert seen == [False] * 4
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        time_alternately([Candidate("a", lambda: 1 / 0)], 2, device=CPU)
    assert gc.isenabled()


def test_speedup_is_free_of_drift_between_rounds():
    """The machine slows down tenfold in the middle; the quotients of the rounds do not see it."""
    found = speedup([1.0, 10.0, 10.0], [0.5, 5.0, 5.0])
    assert found == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 10])
def test_quartiles_equal_numpy(size):
    values = np.random.default_rng(size).normal(size=size)
    spread = Spread.of(values.tolist())
    assert [spread.low, spread.median, spread.high] == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))


def test_bad_arguments(clock):
    with pytest.raises(ValueError, match="rounds is 1; quartiles need at least 2"):
        time_alternately([clock.candidate("a", 1.0)], 1, device=CPU)
    with pytest.raises(ValueError, match=r"names of their own, not \['a', 'a'\]"):
        time_alternately([clock.candidate("a", 1.0), clock.candidate("a", 1.0)], 2, device=CPU)
    with pytest.raises(ValueError, match="threads is 0; it must be at least 1"), num_threads(0):
        pass


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    inside = []

    def use(threads):
        with num_threads(threads):
            inside.append(torch.get_num_threads())
            raise KeyError

    for threads in (before + 1, None):
        with pytest.raises(KeyError):
            use(threads)
        assert torch.get_num_threads() == before
    assert inside == [before + 1, before]
