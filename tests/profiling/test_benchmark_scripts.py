"""The scripts in benchmarks/: what they run, and the page they write."""

import importlib.util
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from transformers import BertConfig
from typer.testing import CliRunner

from peft_variator.cli import bench as bench_module
from peft_variator.cli.main import app
from peft_variator.profiling import SHAPES, BenchmarkReport, BenchmarkSettings, Measurement


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts import each other


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_script("render")
run_all = load_script("run_all")
parts = load_script("parts")
gpu = load_script("gpu")
before_after = load_script("before_after")
BEGIN, END = "<!-- results -->", "<!-- /results -->"
PAGE = f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n"
BOTH = f"{PAGE}\n<!-- parts -->\n<!-- /parts -->\n"


def make_report(model="some-model", length=128, unpacked=None, threads=2):
    return BenchmarkReport(
        model=model,
        settings={"batch": 8, "length": length, "lengths": "even", "task": "encoder", "dtype": "float32", "rounds": 3},
        environment={"cpu": "a CPU", "threads": threads, "torch": "2.13", "transformers": "5.23", "peft": "0.21"},
        command=f"peft-variator bench {model}",
        base_parameters=1_000_000,
        added_parameters=12_345,
        base=Measurement("base", 2_000_000_000, unpacked and 2_000_000_000, 3_000_000, [0.30, 0.60, 0.45]),
        plugins=[
            Measurement("k = 4", 1_000_000_000, unpacked, 1_500_000, [0.15, 0.40, 0.25]),
            Measurement("plugin off", 2_000_000_000, unpacked and 2_000_000_000, 3_000_000, [0.30, 0.60, 0.45]),
        ],
    )


def run_render(tmp_path, *options):
    arguments = ["--results", tmp_path, "--page", tmp_path / "page.md", *options]
    application = typer.Typer()
    application.command()(render.main)
    return CliRunner().invoke(application, [str(argument) for argument in arguments])


def test_rows():
    lines = render.render([make_report()]).splitlines()
    assert lines[0] == "### a CPU, threads: 2, float32 (torch 2.13, transformers 5.23, peft 0.21)"
    assert lines[2].startswith("Processes a row: 1.")
    header, rule, row, off = lines[4:8]
    assert header.count("|") == rule.count("|") == row.count("|") == off.count("|")
    assert row == (
        "| some-model | 8×128 | 4 | 50.0% | 2.00× | 1.80× [1.65–1.90] | 0.90 | 450 [375–525] | 250 [200–325] "
        "| 3.0 MB | 1.5 MB | 12,345 |"
    )
    assert off.startswith("| some-model | 8×128 | plugin off | 0.0% | 1.00× | 1.00× [1.00–1.00] | 1.00 |")
    assert lines[-3:] == ["```sh", "peft-variator bench some-model", "```"]


def test_machines_and_padded_batches_have_tables_of_their_own():
    text = render.render(
        [
            make_report("b", threads=8),
            make_report("c", unpacked=1_600_000_000),
            make_report("a"),
            make_report("d", None),
        ]
    )
    assert text.count("### ") == 2
    assert text.count("| model | input | k |") == 3
    assert text.count("pads computed") == 1
    assert [line.split()[1] for line in text.splitlines() if "| 4 |" in line] == ["a", "d", "c", "b"]
    assert "| c | 8×128 | 4 | 50.0% | 2.00× | 1.80× [1.65–1.90] | 0.90 | 1.25× | 1.44 |" in text
    assert "| d | 8 images | 4 |" in text


def test_the_page_is_written_between_its_markers(tmp_path):
    (tmp_path / "page.md").write_text(BOTH)
    make_report().save(tmp_path / "one.json")
    assert run_render(tmp_path, "--check").exit_code == 1
    assert (tmp_path / "page.md").read_text() == BOTH
    assert run_render(tmp_path).exit_code == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Title\n\n" + BEGIN)
    assert END + "\n\nThe end.\n" in page
    assert page.count("No results are committed yet.") == 1
    assert "old" not in page
    assert "| some-model |" in page
    assert run_render(tmp_path, "--check").exit_code == 0
    make_report("other").save(tmp_path / "two.json")
    done = run_render(tmp_path, "--check")
    assert done.exit_code == 1
    assert "is out of date. Run: python benchmarks/render.py" in done.output


def test_the_committed_page_shows_the_committed_results(capsys):
    render.main(ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmark.md", check=True)


def test_processes_of_one_command_share_a_row():
    first = make_report()
    slower = replace(
        first,
        base=replace(first.base, seconds=[0.60, 0.30]),
        plugins=[replace(plugin, seconds=[0.60, 0.30], peak_memory=4_000_000) for plugin in first.plugins],
    )
    pooled = render.pool([first, slower])
    assert pooled.base.seconds == [0.30, 0.60, 0.45, 0.60, 0.30]
    assert pooled.plugins[0].peak_memory == 4_000_000
    assert pooled.speedup(pooled.plugins[0]).median == pytest.approx(1.5)
    text = render.render([first, slower])
    assert text.count("| some-model |") == 2
    assert "Processes a row: 2. What a single one measured lies at most 33% from its row's speed-up." in text


def test_processes_that_measured_different_things():
    first = make_report()
    other = replace(first, base=replace(first.base, flops=1))
    with pytest.raises(ValueError, match="Processes of one command disagree"):
        render.pool([first, other])


def test_parts_of_a_call(tmp_path, monkeypatch):
    shape = tmp_path / "config.json"
    BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    ).to_json_file(shape)
    settings = BenchmarkSettings(str(shape), [4], batch=2, length=18, rounds=2)
    monkeypatch.setattr(parts, "CASES", {"tiny": settings})
    monkeypatch.setattr(parts, "RESULTS", tmp_path)
    parts.main(["tiny"], threads=1)
    found = json.loads((tmp_path / "tiny.json").read_text())
    # two layers with two wrapped modules each; of 18 tokens 16 are merged by four
    assert [call["vectors"] for call in found["rounds"]["base"]] == [2 * 2 * 2 * 18] * 2
    assert [call["vectors"] for call in found["rounds"]["plugin"]] == [2 * 2 * 2 * 6] * 2
    for calls in found["rounds"].values():
        for call in calls:
            assert call["total"] == pytest.approx(call["networks"] + call["plugin"] + call["rest"])
            assert min(call["networks"], call["rest"]) > 0
    assert all(call["plugin"] == 0 for call in found["rounds"]["base"])
    assert all(call["plugin"] > 0 for call in found["rounds"]["plugin"])
    row = render.parts_table([found]).splitlines()[2]
    assert "| 2×18 | 4 |" in row
    assert "| 3.00× |" in row


def test_an_unknown_part():
    with pytest.raises(typer.BadParameter, match="There is no case 'bert'. Choose from: bert-base-8x128"):
        parts.main(["bert"])


@pytest.mark.parametrize("name", [*run_all.CPU_CASES, *run_all.GPU_CASES])
def test_every_case_is_understood_by_the_command(name, monkeypatch):
    seen = []

    def stop(settings, **more):
        seen.append(settings)
        raise ValueError("stopped before measuring")

    monkeypatch.setattr(bench_module, "run_benchmark", stop)
    words = run_all.command(name, 2)
    done = CliRunner().invoke(app, words[1:])
    assert "stopped before measuring" in done.stderr, done.output
    settings = seen[0]
    assert settings.model in SHAPES
    expected = f"{settings.model}-{settings.batch}" + (f"x{settings.length}" if settings.length else "")
    expected += "-uneven" if settings.lengths == "uneven" else ""
    assert name == ("gpu-" if settings.device == "cuda" else "") + expected
    assert words[-2:] == ["--json", str(ROOT / "benchmarks" / "results" / f"{name}.2.json")]


def test_cases_are_listed_without_running(monkeypatch, capsys):
    monkeypatch.setattr(run_all.subprocess, "run", None)
    run_all.main(["bert-base-2x512"], processes=2, list_only=True)
    first, second = (shlex.join(run_all.command("bert-base-2x512", number)) for number in (1, 2))
    assert capsys.readouterr().out == f"[1/2] {first}\n[2/2] {second}\n"


def test_cases_take_turns_and_then_the_page_is_rendered(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(run_all.subprocess, "run", lambda words, check: ran.append((words, check)))
    monkeypatch.setattr(run_all, "output", lambda name, number: tmp_path / f"{name}.{number}.json")
    done = list(run_all.GPU_CASES)[1]
    (tmp_path / f"{done}.1.json").touch()
    run_all.main(gpu=True, processes=2)
    turns = [(name, number) for number in (1, 2) for name in run_all.GPU_CASES]
    turns.remove((done, 1))
    assert [words for words, _ in ran[:-1]] == [run_all.command(*turn) for turn in turns]
    assert ran[-1][0][1:] == [str(ROOT / "benchmarks" / "render.py")]
    assert all(check for _, check in ran)
    assert capsys.readouterr().out.count("(is there, skipped)") == 1


def test_unknown_case():
    with pytest.raises(typer.BadParameter, match="There is no case 'bert'. Choose from: bert-base-8x128"):
        run_all.command("bert", 1)


def test_reports_of_another_machine_are_not_mixed():
    one = make_report()
    other = replace(one, environment={**one.environment, "torch": "2.14"})
    assert render.render([one, other]).count("### ") == 2


def gpu_application():
    application = typer.Typer()
    application.command()(gpu.main)
    return application


@pytest.mark.parametrize("stage", gpu.STAGES)
def test_a_stage_of_the_gpu_script_runs_dry(stage, tmp_path):
    done = CliRunner().invoke(gpu_application(), [stage, "--dry", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / f"{stage}.json").read_text())
    assert report["dry"]
    assert report["left_out"] == 0
    assert report["rows"]
    assert {"torch", "transformers", "peft"} <= report["environment"].keys()
    for row in report["rows"]:
        for call in row.get("calls", {}).values():
            assert call["milliseconds"] > 0
            assert call["peak_bytes"] >= 0


@pytest.mark.parametrize(("off", "passed"), [(0.0, True), (1e-3, True), (1.0, False), (float("nan"), False)])
def test_a_kernel_that_is_off_in_one_result_does_not_pass(off, passed):
    exact = torch.tensor([1.0, 2.0])
    case = gpu.KernelCase("some", lambda: [exact, exact + off], lambda dtype: lambda: [exact, exact], torch.bfloat16)
    assert case.compare()["passed"] is passed


def test_a_row_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    def stage(run):
        yield lambda: {"name": "first"}
        yield lambda: 1 / 0
        yield lambda: {"name": "off", "passed": False, "difference": 1.0, "allowed": 0.5}

    monkeypatch.setattr(gpu, "STAGES", {"some": (stage, 60)})
    done = CliRunner().invoke(gpu_application(), ["some", "--dry", "--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "ZeroDivisionError" in done.output
    assert "off by 1.00e+00" in done.output
    assert len(json.loads((tmp_path / "some.json").read_text())["rows"]) == 3


def test_a_checkout_is_compared_run_by_run():
    before = [{"call": [1.0, 2.0, 9.0]}, {"call": [4.0, 4.0]}, {"call": [1.0, 1.0]}]
    after = [{"call": [1.0, 1.0, 1.0]}, {"call": [6.0, 2.0]}, {"call": [3.0, 3.0]}]
    ratio = before_after.compare(before, after)["call"]
    assert ratio == {"median": 1.0, "low": 0.5, "high": 3.0, "of_runs": [0.5, 1.0, 3.0]}


def test_another_package_than_that_of_the_checkout_is_not_measured(tmp_path):
    with pytest.raises(RuntimeError, match="peft_variator is imported from"):
        before_after.measure(tmp_path, "tiny", 1, 1)
