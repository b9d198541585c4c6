"""The table of latencies: what it interpolates, what it says beyond its grid, and how it is kept and measured."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_variator.runtime import BatchRecord, LatencyCheck, LatencyTable, profile_latency, quality_from_card

from .models import causal, encoder, made_table


TABLE = made_table()


@given(k=st.sampled_from(TABLE.ratios), batch=st.integers(1, 64), length=st.integers(8, 256))
def test_what_is_linear_is_interpolated_exactly(k: int, batch: int, length: int) -> None:
    assert TABLE.latency(k, batch, length) == pytest.approx(1e-3 + 1e-5 * batch * length * (0.5 + 0.5 / k))


@given(k=st.sampled_from(TABLE.ratios), batch=st.integers(1, 1000), length=st.integers(1, 5000))
def test_beyond_the_grid_more_work_takes_no_less_time(k: int, batch: int, length: int) -> None:
    table = made_table(batch_sizes=(4, 8), lengths=(16, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = table.latency(k, batch, length) * (1 - 1e-9)
        assert seconds > 0
        assert table.latency(k, batch + 1, length) >= seconds
        assert table.latency(k, batch, length + 1) >= seconds


def test_a_table_is_calibrated_by_what_an_engine_s_batches_took() -> None:
    def batch(ratio: int, factor: float, failed: bool = False) -> BatchRecord:
        return BatchRecord(ratio, 4, 32, (0.0,) * 4, factor * TABLE.latency(ratio, 4, 32), 0, failed)

    failed = batch(1, 100.0, failed=True)
    many = [batch(1, each) for each in (1.0, 1.1, 1.2, 9.0, 9.0)]
    table = TABLE.calibrated([*many, *[batch(4, 1.5)] * 9, batch(8, 0.1), failed])
    for k, factor in {1: 1.2, 4: 1.5, 2: 1.5, 8: 1.5}.items():
        assert table.latency(k, 10, 100) == pytest.approx(factor * TABLE.latency(k, 10, 100))
    with pytest.raises(ValueError, match="on_batch"):
        TABLE.calibrated([failed])


def test_extrapolation_is_said_once() -> None:
    table = made_table()
    with pytest.warns(UserWarning, match="extrapolated"):
        beyond = table.latency(1, 128, 512)
    assert beyond > table.latency(1, 64, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.latency(1, 1000, 8)
        table.latency(2, 1, 1)


def test_one_point_scales_with_the_work() -> None:
    table = made_table(batch_sizes=(4,), lengths=(16,))
    with pytest.warns(UserWarning, match="extrapolated"):
        assert table.latency(1, 8, 32) == pytest.approx(4 * table.latency(1, 4, 16))
    assert table.latency(1, 1, 1) == table.latency(1, 4, 16)


def test_a_noisy_grid_does_not_go_below_its_edge() -> None:
    table = LatencyTable((1,), (1, 2), (8, 16), {1: ((0.002, 0.004), (0.001, 0.003))})
    with pytest.warns(UserWarning, match="extrapolated"):
        assert table.latency(1, 50, 16) >= 0.003


def test_unknown_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio=3.*\[1, 2, 4, 8\]"):
        TABLE.latency(3, 1, 8)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    checks = (LatencyCheck(1, 2, 8, 0.002, 0.0018), LatencyCheck(2, 2, 8, 0.001, 0.0015))
    table = dataclasses.replace(
        made_table(quality={1: 1.0, 4: 0.9}), checks=checks, model="tiny", environment={"a": 1}
    )
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert table.error == {"median": pytest.approx(0.3), "largest": pytest.approx(0.5)}
    assert json.loads((tmp_path / "table.json").read_text())["interpolation_error"] == table.error
    assert made_table().error is None


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "x", None, True])
def test_a_check_is_of_a_time(seconds: Any) -> None:
    with pytest.raises(ValueError, match="checks: measured"):
        LatencyCheck(1, 2, 8, seconds, 0.1)


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 100_000, "no json", '{"format": 1}', '{"format": 2}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match="table.json"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"ratios": ()}, "ratios"),
        ({"batch_sizes": (4, 1)}, "batch_sizes"),
        ({"lengths": (0, 8)}, "lengths"),
        ({"seconds": {1: ((0.1,),)}}, "seconds"),
        ({"seconds": {1: ((0.1, -0.1),)}}, "seconds"),
        ({"seconds": {1: ((0.1, float("nan")),)}}, "seconds"),
        ({"seconds": {1: ((0.1, 0.2),), 2: ((-1.0, 0.2),)}}, "seconds has the ratios"),
        ({"seconds": {"1": ((0.1, 0.2),), "01": ((0.1, 0.2),)}}, "seconds has the ratios"),
        ({"environment": None}, "environment=None"),
        ({"quality": {2: 0.5}}, "quality"),
        ({"quality": {1: float("nan")}}, "quality"),
        ({"quality": {1: "a"}}, "quality"),
    ],
)
def test_what_is_no_table_is_refused(fields: dict[str, Any], named: str) -> None:
    good: dict[str, Any] = {"ratios": (1,), "batch_sizes": (1,), "lengths": (8, 16), "seconds": {1: ((0.1, 0.2),)}}
    LatencyTable(**good)
    with pytest.raises((TypeError, ValueError), match=named):
        LatencyTable(**(good | fields))


@pytest.mark.parametrize("make", [encoder, causal])
def test_profiling(make: Any) -> None:
    model = make()
    steps: list[None] = []
    table = profile_latency(
        model,
        [4, 2],
        [4, 1],
        [8, 24],
        quality={1: 1.0, 4: 0.9, 8: 0.8},  # a card knows ratios that are not measured here
        rounds=2,
        min_seconds=0.001,
        on_step=lambda: steps.append(None),
    )
    assert table.quality == {1: 1.0, 4: 0.9}
    assert (table.ratios, table.batch_sizes, table.lengths) == ((1, 2, 4), (1, 4), (8, 24))
    assert {(check.batch, check.length) for check in table.checks} == {(2, 16)}
    assert table.error is not None
    assert len(steps) == 2 * 3 * 5
    assert "torch" in table.environment
    assert model.compression_ratio == 4
    assert LatencyTable.from_json(table.to_json()) == table


def test_profiling_a_model_without_a_plugin() -> None:
    base = encoder().unload()
    assert profile_latency(base, [1], [1], [8], rounds=2, min_seconds=0).ratios == (1,)
    with pytest.raises(ValueError, match="no active Variator plugin"):
        profile_latency(base, [2], [1], [8], rounds=2, min_seconds=0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(([0], [1], [8]), "ratios"), (([2], [], [8]), "batch_sizes"), (([2], [1], [65]), "64 positions")],
)
def test_what_cannot_be_profiled_is_refused(arguments: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        profile_latency(encoder(), *arguments, rounds=2, min_seconds=0)


def test_quality_is_read_off_a_card(tmp_path: Path) -> None:
    assert quality_from_card(tmp_path) is None
    (tmp_path / "README.md").write_text(
        "# A plugin\n\n| k | FLOPs saved | cosine, before → after | relative error, before → after |\n"
        "| ---: | ---: | ---: | ---: |\n| 2 | 30.0% | 0.5000 → 0.9700 | 0.9 → 0.2 |\n"
        "| 4 | 45.0% | 0.4 → 0.9100 | 1 → 0.3 |\n"
    )
    assert quality_from_card(tmp_path) == {1: 1.0, 2: 0.97, 4: 0.91}
    assert quality_from_card(tmp_path, "agreement") is None


def test_quality_is_read_off_a_card_with_tasks(tmp_path: Path) -> None:
    """The cards of shipped plugins: a column for each ratio, and a table of speed below."""
    (tmp_path / "README.md").write_text(
        "# A plugin\n\n|  | base | k = 4 | k = 8 |\n| --- | ---: | ---: | ---: |\n"
        "| STS-B test | 82.03 | 81.40 | 81.63 |\n| SST-2 | 80.5 | | 79 |\n"
        "\n| batch × length | k = 8 |\n| --- | ---: |\n| 32×128 | 1.28 [1.22–1.48] |\n"
    )
    assert quality_from_card(tmp_path) == quality_from_card(tmp_path, "STS-B") == {1: 82.03, 4: 81.40, 8: 81.63}
    assert quality_from_card(tmp_path, "SST-2") == {1: 80.5, 8: 79.0}
    assert quality_from_card(tmp_path, "agreement") is None
    page = (tmp_path / "README.md").read_text()
    wrong = "| a | base | plugin |\n| --- | --- | --- |\n| 1 | x | y |\n\n"
    (tmp_path / "README.md").write_text(wrong + page.replace("| STS-B test", "| errors (less is better)"))
    assert quality_from_card(tmp_path) == {1: 80.5, 8: 79.0}
    shipped = quality_from_card(Path(__file__).parents[2] / "examples" / "plugins" / "all-MiniLM-L6-v2")
    assert shipped is not None
    assert {1, 8, 16} <= set(shipped)


def test_a_table_is_restricted_to_some_ratios() -> None:
    checks = tuple(LatencyCheck(k, 1, 12, 0.1, 0.1) for k in (1, 4))
    table = LatencyTable((1, 2, 4), (1,), (8, 16), {k: ((1 / k, 2 / k),) for k in (1, 2, 4)}, {1: 1.0, 4: 0.9}, checks)
    part = table.restrict([2])
    assert part.ratios == (1, 2)
    assert part.quality == {1: 1.0}
    assert part.checks == checks[:1]
    assert part.latency(2, 1, 8) == table.latency(2, 1, 8)
    with pytest.raises(ValueError, match="8"):
        table.restrict([8])


@given(st.integers(1, 100), st.integers(1, 200))
@pytest.mark.filterwarnings("ignore")
def test_a_time_is_interpolated_along_lengths_and_then_along_batches(batch, length):
    """As NumPy does it with all rows inside of the grid; outside it is never less than at the edge."""
    seconds = ((1.0, 3.0, 4.0), (2.0, 3.5, 9.0), (5.0, 6.0, 20.0), (7.0, 30.0, 31.0))
    batches, lengths = (1, 4, 16, 64), (8, 32, 128)
    table = LatencyTable((1,), batches, lengths, {1: seconds})
    rows = [np.interp(length, lengths, row) for row in seconds]
    expected = np.interp(batch, batches, rows)
    found = table.latency(1, batch, length)
    if batch <= batches[-1] and length <= lengths[-1]:
        assert found == pytest.approx(expected, rel=1e-12)
    else:
        assert found >= expected
