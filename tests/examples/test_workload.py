"""The workload example: arrivals keep their rate, every policy runs and adds up, and a tiny model runs live."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from peft_variator.runtime import QueueItem
from tests.runtime.models import encoder, made_table, tokenizer


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "workload"
TRACE = sorted((0.1 * number + (5.0 if number % 10 == 0 else 0.0), 40 + 40 * (number % 2)) for number in range(200))
TRACES = {"conv": TRACE, "code": TRACE}
QUALITY = {1: 80.0, 2: 79.0, 4: 77.0, 8: 74.0}


@pytest.mark.parametrize("kind", ["conv", "code", "poisson", "gamma"])
def test_arrivals_have_the_rate_that_is_asked_for(scripts, kind):
    arrivals = scripts("arrivals")
    lengths = arrivals.lengths_of(TRACE, 2, 24, 32)
    items = arrivals.make_items(kind, 50.0, 60.0, lengths, 100.0, TRACE)
    assert len(items) == pytest.approx(3000, rel=0.15)
    moments = [item.arrival for item in items]
    assert moments == sorted(moments)
    assert 0 <= moments[0] <= moments[-1] < 60
    assert {item.length for item in items} == {24, 32}
    assert all(item.deadline == pytest.approx(item.arrival + 0.1) for item in items)
    if kind in ("conv", "code"):
        assert [item.length for item in items[:200]] == lengths


def test_a_trace_is_read(scripts, tmp_path):
    (tmp_path / "conv.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    assert scripts("arrivals").read_trace(tmp_path / "conv.csv") == [(0.0, 374), (pytest.approx(4.314579), 396)]


def test_no_policy_is_better_than_the_bound(scripts):
    """Against trying all subsets, each in order of deadlines."""
    bound, drawn = scripts("bound"), random.Random(0)
    for _ in range(150):
        moments = sorted(drawn.uniform(0, 6) for _ in range(7))
        items = [QueueItem(moment, drawn.randint(1, 3), moment + 2.5) for moment in moments]

        def in_time(chosen):
            now = 0.0
            for item in chosen:
                now = max(now, item.arrival) + item.length
                if now > item.deadline:
                    return False
            return True

        best = max(n for n in range(8) for chosen in combinations(items, n) if in_time(chosen))
        assert bound.highest_attainment(items, float) == pytest.approx(best / 7)
    assert bound.highest_attainment([], float) == 1.0
    with pytest.raises(ValueError, match="sorted"):
        bound.highest_attainment(items[::-1], float)


def test_a_tiny_model_runs_live_and_every_policy_is_simulated(scripts, tmp_path):
    run = scripts("run")
    subject = run.Subject(
        "tiny",
        encoder(),
        tokenizer(),
        (1, 4),
        (1,),
        (8, 48),
        2,
        60_000.0,
        {1: 80.0, 4: 77.0},
        (encoder().unload(), 78.0),
    )
    measured, kept = {}, []

    def keep():
        kept.append(run.json.dumps(measured))

    run.measure(subject, TRACES, [], live_seconds=0, results=measured, keep=keep, rounds=2)
    assert set(measured["tables"]) == {"table", "two_models"}
    # Live at a rate that no machine fails at, whatever it has measured.
    table = made_table(lengths=(8, 48), batch_sizes=(1, 2), quality=QUALITY, scale=20.0)
    live, records = run.live(subject, table, subject.drawn(TRACE), "slack-fit", load=0.5, seconds=0.5)
    assert live["texts"] > 3
    assert live["attainment"] == live["simulated_attainment"] == 1.0
    assert sum(live["texts_by_ratio"].values()) == live["texts"] == sum(record.size for record in records)
    late, _ = run.live(replace(subject, slo_ms=1e-3), table, subject.drawn(TRACE), "k = 1", load=0.5, seconds=0.1)
    assert late["attainment"] == 0.0

    # What was measured is not measured again.
    measured["tables"]["table"] = run.json.loads(table.to_json())
    for _ in range(2):
        run.measure(subject, TRACES, [("k = 1", 1.0)], live_seconds=0.4, results=measured, keep=keep)
    assert len(kept) == 2 + len(measured["live"]) == 2 + len(run.SEEDS)
    assert len(run.live_lines(measured["live"])) == len(measured["live"]) + 2

    made = made_table(lengths=(8, 48), batch_sizes=(1, 2), quality=QUALITY, scale=10.0)
    measured |= {"slo_ms": 200.0}
    measured["tables"]["table"] = run.json.loads(made.to_json())
    for loads in [(0.5,), (0.5, 1.2)]:
        run.simulate_all(measured, TRACES, 3.0, 1, keep=keep, loads=loads)
    rows = run.json.loads(kept[-1])["simulated"]
    assert len(rows) == 4 * 2 * 9
    for row in rows:
        assert sum(row["texts_by_ratio"].values()) == row["texts"]
        assert 74.0 - 1e-9 <= row["quality"] <= 80.0 + 1e-9
        assert row["highest_attainment"] is None or row["attainment"] <= row["highest_attainment"] + 1e-9
    by_name = {(row["arrivals"], row["load"], row["policy"]): row for row in rows}
    assert by_name["poisson", 0.5, "slack-fit"]["quality"] > 79.5
    assert by_name["poisson", 1.2, "slack-fit"]["quality"] > by_name["poisson", 1.2, "k = 8"]["quality"]
    assert by_name["poisson", 1.2, "smaller model"]["quality"] == 78.0
    run.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert len(run.table_lines(rows)) == len(rows) + 2
