"""The scripts about packed bases: a quick benchmark from end to end, what the real encoder gave, and the page."""

import json
from pathlib import Path

import pytest
import torch


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "packed_base"
CHOSEN = [
    "dense bfloat16",
    "packed bfloat16",
    "packed bfloat16, kept unpacked",
    "dense bfloat16, LoRA",
    "packed bfloat16, SparseLoRA",
]


@pytest.fixture(scope="module")
def report(scripts, tmp_path_factory):
    """A quick benchmark whose rows run in this process: a process each takes seconds to start."""
    bench, row, folder = scripts("bench"), scripts("bench_row"), tmp_path_factory.mktemp("bench")

    def run(home, chosen, settings, *flags):
        output = folder / "row.json"
        options = {"length": settings.length, "rank": settings.rank, "samples": settings.samples, "threads": 1}
        options |= {"cold": "--cold" in flags, "unchanged": "--unchanged" in flags}
        row.main(home / chosen.folder, output, chosen.unpacked, chosen.adapter, min_seconds=0.0, **options)
        return json.loads(output.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "run_process", run)
        patch.setattr(bench, "ROWS", {name: bench.ROWS[name] for name in CHOSEN})
        bench.main(["llama-3.2-1b"], rounds=5, rank=4, threads=1, work=None, output=folder, quick=True)
    return json.loads((folder / "bench-llama-3.2-1b.json").read_text())


def test_every_row_has_its_figures(report):
    assert list(report["rows"]) == CHOSEN
    for name, row in report["rows"].items():
        kinds = {figure.rpartition("_")[0] for figure in row} - {"before"}
        more = {"step"} if "LoRA" in name else {"cold_load", "cold_read", "unchanged_load", "unchanged_read"}
        assert kinds == {"load", "read", "prefill", "token"} | more
        for figure, values in row.items():
            assert len(values["samples"]) == 2
            assert not figure.endswith("_seconds") or min(values["samples"]) > 0
    assert report["rows"]["dense bfloat16"]["load_seconds"]["times_dense"]["median"] == 1


def test_packed_files_are_smaller(report):
    files = report["file_bytes"]
    assert files["packed-bfloat16"] < files["dense-bfloat16"] < files["dense-float32"]


def test_figures_are_divided_by_those_of_the_same_round(scripts):
    bench = scripts("bench")
    samples = {
        "dense bfloat16": [{"load_seconds": 2.0}, {"load_seconds": 4.0}],
        "packed bfloat16": [{"load_seconds": 1.0}, {"load_seconds": 8.0}],
    }
    found = bench.summarise(samples)["packed bfloat16"]["load_seconds"]
    assert found["times_dense"] == {"low": 0.875, "median": 1.25, "high": 1.625}
    assert found["quartiles"]["median"] == 4.5


@pytest.mark.parametrize("script", ["raises", pytest.param("itself", marks=pytest.mark.slow)])
def test_a_row_that_fails_says_why(scripts, tmp_path, script, monkeypatch):
    """The script takes seconds to import what it needs before it finds that there is no model."""
    bench = scripts("bench")
    if script == "raises":
        (tmp_path / "bench_row.py").write_text("raise OSError('no model')")
        monkeypatch.setattr(bench, "HERE", tmp_path)
    settings = bench.Settings(16, 4, 2, 2, 0.0, 1, True)
    with pytest.raises(RuntimeError, match=r"bench_row\.py [\s\S]* failed: [\s\S]*OSError"):
        bench.measure_row(tmp_path / "nowhere", bench.ROWS["dense bfloat16"], settings)


def test_peak_memory_sees_what_was_held_and_let_go(scripts):
    peak = scripts("peak")
    with peak.PeakMemory() as before:
        pass
    with peak.PeakMemory() as during:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        scripts("time").sleep(0.05)
        del held
    assert 60e6 < during.anonymous - before.anonymous < 100e6


def test_the_page_is_written_between_its_marks(scripts, report, tmp_path):
    render = scripts("render")
    results = EXAMPLE / "results"
    (tmp_path / "end-to-end.json").write_text((results / "end-to-end.json").read_text())
    (tmp_path / "bench-a.json").write_text(json.dumps(report))
    page = tmp_path / "page.md"
    page.write_text("A\n<!-- end-to-end -->\nold\n<!-- /end-to-end -->\nB\n<!-- bench -->\n<!-- /bench -->\nC\n")
    render.main(tmp_path, page)
    text = page.read_text()
    assert [word in text for word in ("A\n<!--", "\nB\n", "-->\nC\n", "old")] == [True, True, True, False]
    assert "| merged, in a fresh process |" in text
    assert text.count("| packed bfloat16, SparseLoRA |") == 2
    render.main(tmp_path, page)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="<!-- end-to-end -->"):
        render.main(tmp_path, page)


def test_the_page_shows_the_committed_results(scripts, tmp_path):
    render = scripts("render")
    copy = tmp_path / "page.md"
    copy.write_text(render.PAGE.read_text())
    render.main(page=copy)
    assert copy.read_text() == render.PAGE.read_text()
