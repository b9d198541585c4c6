"""Comparing a base with its plugin: what is measured, and the report of it."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from peft import get_peft_model
from rich.console import Console
from transformers import BertConfig, BertModel

from peft_variator import VariatorConfig
from peft_variator.profiling import (
    BenchmarkReport,
    BenchmarkSettings,
    Measurement,
    Spread,
    compare,
    count_flops,
    count_steps,
    make_table,
    run_benchmark,
    save_plot,
    share_weights,
)


CPU = torch.device("cpu")
TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 40,
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def make_report(unpacked=None):
    """A report whose derived figures can be worked out by hand."""
    return BenchmarkReport(
        model="some-model",
        settings={"batch": 8, "length": 128, "lengths": "even", "task": "encoder", "dtype": "float32", "rounds": 3},
        environment={"device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.13"},
        command="peft-variator bench some-model",
        base_parameters=1_000_000,
        added_parameters=12_345,
        base=Measurement("base", 2_000_000_000, unpacked and 2_000_000_000, 3_000_000, [0.30, 0.60, 0.45]),
        plugins=[Measurement("k = 4", 1_000_000_000, unpacked, 1_500_000, [0.15, 0.40, 0.25])],
    )


def test_the_base_is_untouched_and_every_setting_is_measured():
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    base = BertModel(BertConfig(**fields)).eval()
    modules = dict(base.named_modules())
    plugin = get_peft_model(share_weights(base), VariatorConfig(init_weights=False, correction_dim=16)).eval()
    inputs = {"input_ids": torch.arange(10).repeat(2, 1) + 10, "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    steps = []
    measured = compare(
        base,
        plugin,
        inputs,
        [1, 4, 2],
        rounds=2,
        min_seconds=0,
        device=CPU,
        with_disabled=True,
        on_step=lambda: steps.append(1),
    )
    assert [one.name for one in measured] == ["base", "k = 1", "k = 4", "k = 2", "plugin off"]
    assert len(steps) == count_steps(BenchmarkSettings("", [1, 4, 2], rounds=2, with_disabled=True))
    assert dict(base.named_modules()) == modules
    flops = {one.name: one.flops for one in measured}
    assert flops["base"] == flops["k = 1"] == flops["plugin off"]
    assert flops["k = 4"] < flops["k = 2"] < flops["base"]
    for ratio in (2, 4):
        plugin.set_compression_ratio(ratio)
        assert flops[f"k = {ratio}"] == count_flops(plugin, inputs)
    assert all(one.peak_memory > 0 and len(one.seconds) == 2 and one.flops_unpacked is None for one in measured)


def test_no_ratio():
    with pytest.raises(ValueError, match="ratios is empty; name at least one"):
        compare(torch.nn.Identity(), None, {}, [], rounds=2, device=CPU)


def test_uneven_lengths_state_both_ideals(tiny):
    report = run_benchmark(
        BenchmarkSettings(tiny, [4], batch=6, length=40, lengths="uneven", rounds=2, min_seconds=0, threads=1)
    )
    even = run_benchmark(BenchmarkSettings(tiny, [4], batch=6, length=40, rounds=2, min_seconds=0, threads=1))
    plugin = report.plugins[0]
    assert report.base.flops == report.base.flops_unpacked == even.base.flops
    assert plugin.flops_unpacked == even.plugins[0].flops
    assert report.ideal_speedup(plugin) > report.unpacked_speedup(plugin) == even.ideal_speedup(even.plugins[0])
    assert even.unpacked_speedup(even.plugins[0]) is None


def test_a_run_fills_in_its_settings(tiny):
    settings = BenchmarkSettings(tiny, [2, 4], batch=2, rounds=2, min_seconds=0, threads=1, dtype="bfloat16")
    steps = []
    report = run_benchmark(settings, command="typed", on_step=lambda: steps.append(1))
    assert len(steps) == count_steps(settings)
    assert (report.settings["task"], report.settings["length"], report.command) == ("encoder", 128, "typed")
    assert report.environment["threads"] == 1
    # Scores, two maps into the bottleneck of 64 (one with bias) and one out of it, in each of 2 layers.
    assert report.added_parameters == 2 * (32 + 2 * 32 * 64 + 64 + 64 * 32)
    torch.manual_seed(0)
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    assert report.base_parameters == sum(p.numel() for p in BertModel(BertConfig(**fields)).parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [0]}, "compression_ratio=0 has to be an integer of at least 1"),
        ({"ratios": [2, 2]}, r"names of their own, not \['base', 'k = 2', 'k = 2'\]"),
        ({"rounds": 1}, "rounds is 1; quartiles need at least 2"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"length": 0}, "length is 0; it must be at least 1"),
        ({"length": 513}, "length is 513; the model has 512 positions"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"device": "cuda:99"}, "The device 'cuda:99' cannot be used: "),
        ({"device": "abacus"}, "The device 'abacus' cannot be used: "),
    ],
)
def test_bad_settings(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        run_benchmark(
            replace(BenchmarkSettings(tiny, [2], batch=1, length=4, rounds=2, min_seconds=0, threads=1), **change)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 1}, "rounds is 1; quartiles need at least 2"),
        ({"min_seconds": -1.0}, r"min_seconds is -1\.0; it must be a number of seconds"),
        ({"min_seconds": float("inf")}, "min_seconds is inf; it must be a number of seconds"),
    ],
)
def test_samples_that_can_t_be_taken_are_refused_before_anything_is_built(change, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings("qwen2.5-0.5b", [2], **change)
    counted = []
    with pytest.raises(ValueError, match=message):
        compare(
            torch.nn.Identity(),
            None,
            {},
            [2],
            on_step=lambda: counted.append(1),
            device=CPU,
            **{"rounds": 2, **change},
        )
    assert not counted


@pytest.mark.parametrize("change", [{"length": 10}, {"lengths": "uneven"}])
def test_images_have_no_length(change):
    with pytest.raises(ValueError, match="vit-base takes images, whose number of patches follows"):
        run_benchmark(BenchmarkSettings("vit-base", [2], **change))


def test_derived_figures():
    report = make_report(unpacked=1_600_000_000)
    summary = report.summary(report.plugins[0])
    assert summary == {
        "flops_saved": 0.5,
        "ideal_speedup": 2.0,
        "speedup": {"low": pytest.approx(1.65), "median": pytest.approx(1.8), "high": pytest.approx(1.9)},
        "pays": True,
        "measured_over_ideal": pytest.approx(0.9),
        "ideal_speedup_unpacked": 1.25,
        "measured_over_ideal_unpacked": pytest.approx(1.44),
    }
    assert report.speedup(report.plugins[0]) == Spread(*summary["speedup"].values())


@pytest.mark.parametrize("unpacked", [None, 1_600_000_000])
def test_json_round_trip(tmp_path, unpacked):
    path = tmp_path / "new" / "report.json"
    report = make_report(unpacked)
    report.save(path)
    assert BenchmarkReport.load(path) == report
    assert json.loads(path.read_text())["summary"]["k = 4"] == report.summary(report.plugins[0])
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 2}'])
def test_other_json_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="other.json is no benchmark report of format 1. Write it with"):
        BenchmarkReport.load(path)


def render(report, width):
    output = StringIO()
    Console(width=width, file=output).print(make_table(report))
    return output.getvalue()


def test_table_fits_a_terminal():
    text = render(make_report(), 80)
    row = next(line for line in text.splitlines() if line.strip().startswith("k = 4"))
    assert row.split() == ["k", "=", "4", "50.0%", "2.00×", "1.80×", "0.90", "250", "1.5", "MB", "12,345"]
    assert "some-model, encoder, 8×128, float32" in text
    assert "1.65–1.90" in text
    assert "200–325" in text
    assert "Base: 2.00 GFLOPs, 1,000,000 parameters" in text
    assert "pads" not in text


def test_table_of_a_padded_batch():
    report = make_report(unpacked=1_600_000_000)
    text = render(replace(report, settings={**report.settings, "lengths": "uneven"}), 120)
    row = next(line for line in text.splitlines() if line.strip().startswith("k = 4"))
    assert row.split()[3:9] == ["50.0%", "2.00×", "1.80×", "0.90", "1.25×", "1.44"]
    assert "8×128 with uneven lengths" in text
    assert "spends FLOPs on padding" in text


def test_names_are_no_markup():
    assert "models/[bold]x, encoder" in render(replace(make_report(), model="models/[bold]x"), 80)


def test_title_of_images_and_sound():
    report = make_report()
    for task, inputs in (("vision", "images"), ("encoder", "recordings")):
        settings = {**report.settings, "task": task, "length": None}
        assert replace(report, settings=settings).title == f"some-model, {task}, 8 {inputs}, float32"
    assert replace(report, environment={**report.environment, "gpu": "a GPU"}).machine == "a GPU"


def test_plot_is_a_picture(tmp_path):
    save_plot(make_report(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_variator.profiling.report.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"matplotlib, which is not installed. Run: pip install 'peft-variator\[plots\]'"
    ):
        save_plot(make_report(), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
