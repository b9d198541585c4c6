"""`peft-variator convert-checkpoint`: what it writes and what it says."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from peft_variator.cli.main import app


FIXTURE = Path(__file__).parents[1] / "fixtures" / "released"


def convert(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert-checkpoint", *map(str, words)])


def test_an_adapter_and_its_figures(tmp_path: Path) -> None:
    output, figures = tmp_path / "adapter", tmp_path / "figures.json"
    done = convert(FIXTURE / "plugin.pkl", "--base", FIXTURE / "base", "-o", output, "--json", figures)
    assert done.exit_code == 0, done.stderr
    report = json.loads(figures.read_text())
    adapter = load_file(output / "adapter_model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in adapter.values())
    assert (report["base"], report["residual_scale"]) == (str(FIXTURE / "base"), 1)
    assert str(output) in done.stdout
    code = done.stdout.partition("Next, in Python:\n")[2]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code), names)
    assert names["model"].compression_ratio == 4


def test_what_is_wrong_is_a_line_with_the_key(tmp_path: Path) -> None:
    plugin = torch.load(FIXTURE / "plugin.pkl", weights_only=True)
    del plugin["mux_layer.1.mux_layer.bias"]
    torch.save(plugin, tmp_path / "plugin.pkl")
    done = convert(tmp_path / "plugin.pkl", "-o", tmp_path / "adapter")
    assert done.exit_code == 1
    assert "mux_layer.1.mux_layer.bias" in done.stderr
    assert not (tmp_path / "adapter").exists()
    assert convert(tmp_path / "nothing.pkl", "-o", tmp_path / "adapter").exit_code == 1


def test_other_tensors_and_the_scale_are_told(tmp_path: Path) -> None:
    plugin = torch.load(FIXTURE / "plugin.pkl", weights_only=True) | {"t5.shared.weight": torch.zeros(1)}
    torch.save(plugin, tmp_path / "plugin.pkl")
    done = convert(tmp_path / "plugin.pkl", "-o", tmp_path / "adapter", "--residual-scale", "10")
    assert done.exit_code == 0, done.stderr
    assert "1 other tensor" in done.stderr
    assert "10" in done.stdout
    plain = convert(tmp_path / "plugin.pkl", "-o", tmp_path / "plain")
    assert plain.exit_code == 0
    key = "base_model.model.encoder.block.0.layer.1.DenseReluDense.variator_up.bias"
    scaled, plain = (load_file(tmp_path / name / "adapter_model.safetensors")[key] for name in ("adapter", "plain"))
    torch.testing.assert_close(scaled, plain * 10)
