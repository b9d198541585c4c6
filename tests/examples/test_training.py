"""Every way to train a plugin that examples/training shows, on tiny models: the plugin moves, is saved, and loads."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "training"


@pytest.mark.parametrize(
    ("script", "switches"),
    [
        ("classify", []),
        ("summarize", []),
        ("accelerate_loop", []),
        ("sft", []),
        ("sft", ["--packing"]),
        ("sft", ["--padding-free"]),
    ],
)
def test_an_example_trains_a_plugin(
    script: str, switches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "sft":
        pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--tiny", "--output", str(tmp_path / "plugin"), *switches])
    runpy.run_path(str(EXAMPLE / f"{script}.py"), run_name="__main__")
    assert PeftConfig.from_pretrained(str(tmp_path / "plugin")).compression_ratio == 4
    weights = load_file(tmp_path / "plugin" / "adapter_model.safetensors")
    corrections = [value for name, value in weights.items() if "variator_neuron" in name and value.is_floating_point()]
    assert corrections
    assert all(value.isfinite().all() for value in corrections)
    assert any(not torch.equal(value, torch.zeros_like(value)) for value in corrections)
