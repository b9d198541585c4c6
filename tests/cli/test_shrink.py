"""`peft-variator shrink` as it is typed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from peft_variator.cli.shrink import in_half_precision
from tests.cli.commands import run_command
from tests.cli.saved_plugins import save_plugin


invoke = partial(run_command, "shrink")


@pytest.mark.parametrize(("bits", "share"), [(4, 0.3), (8, 0.45)])
def test_a_plugin_in_few_bits(bits: int, share: float, tmp_path: Path) -> None:
    plugin, output = (
        save_plugin(tmp_path, decompression="neurons", correction_dim=24, compensation_rank=2),
        tmp_path / "small",
    )
    before = (plugin / "adapter_model.safetensors").read_bytes()
    status, out, err = invoke(plugin, "--output", output, "--bits", bits, "--json", tmp_path / "report.json")
    assert status == 0, err
    assert f"Next: peft-variator evaluate {output} --data my_texts.txt" in out
    assert f"its copies in {bits} bits a number" in (output / "README.md").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bits"] == bits
    assert report["bytes_after"] == (output / "adapter_model.safetensors").stat().st_size
    kept = load_file(output / "adapter_model.safetensors")
    assert sum(value.nbytes for value in kept.values()) < share * report["bytes_before"]
    assert {value.dtype for value in kept.values()} == {torch.uint8, torch.int8, torch.float16, torch.int32}
    assert (plugin / "adapter_model.safetensors").read_bytes() == before
    ids = torch.arange(3, 27).view(2, 12)
    found = []
    for folder in (plugin, output):
        base = AutoModel.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            found.append(PeftModel.from_pretrained(base, folder).eval()(ids).last_hidden_state)
    # Copies of random weights are as far from the base's as can be, so this is the worst case.
    assert 0 < float((found[0] - found[1]).abs().mean()) < 0.2
    status, out, _ = run_command("info", output, "--json", tmp_path / "info.json")
    assert status == 0
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["settings"]["correction_bits"] == bits
    assert info["settings"]["compensation_bits"] == 8
    whole = tmp_path / "whole.json"
    assert run_command("info", plugin, "--json", whole)[0] == 0
    # But for what fills up the last block of each map.
    assert 0 <= info["parameters"] - json.loads(whole.read_text())["parameters"] < 64 * 4


def test_what_can_t_be_shrunk(tmp_path: Path) -> None:
    plugin, output = save_plugin(tmp_path, decompression="neurons"), tmp_path / "small"
    bottleneck = save_plugin(tmp_path / "other", bottleneck_dim=4)
    get_peft_model(AutoModel.from_pretrained(tmp_path / "model"), LoraConfig()).save_pretrained(tmp_path / "lora")
    for words, said in (
        ((plugin, "-o", output, "--bits", "5"), "4 or 8"),
        ((bottleneck, "-o", output), "copies no neurons"),
        ((tmp_path / "lora", "-o", output), "LORA"),
        ((tmp_path / "nothing", "-o", output), "nothing"),
        ((plugin, "-o", tmp_path / "model"), "model"),
    ):
        status, _, err = invoke(*words)
        assert status == 1, words
        assert said in err
    assert not output.exists()


def test_numbers_that_have_no_room_in_half_precision_stay() -> None:
    tensors = {
        "large": torch.tensor([1e6, 1.0]),
        "small": torch.tensor([0.5]),
        "double": torch.tensor([0.5], dtype=torch.float64),
        "index": torch.tensor([7]),
        "far": torch.tensor([2**40]),
        "none": torch.zeros(0, dtype=torch.int64),
    }
    found = in_half_precision(tensors)
    wanted = [torch.float32, torch.float16, torch.float64, torch.int32, torch.int64, torch.int32]
    assert [value.dtype for value in found.values()] == wanted
    assert all(torch.equal(found[key].double(), tensors[key].double()) for key in tensors)
