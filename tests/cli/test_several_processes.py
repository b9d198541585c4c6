"""`peft-variator train` and `restore` on two processes do what they do on one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed
from typer.testing import CliRunner

from peft_variator.cli.main import app
from peft_variator.sparsity import PruningConfig, prune
from tests.processes import free_port
from tests.tiny_models import tiny_model
from tests.word_tokenizer import numbered_words, word_tokenizer


# Two held-out examples: more than fill a batch would have some counted twice, as in `Trainer`.
QUICK = ["--steps", "4", "--held-out", "2", "--max-length", "16", "--lr", "0.001"]


def save_model(folder: Path, pruned: bool) -> Path:
    set_seed(0)
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=40, initializer_range=0.4)
    if pruned:
        prune(model, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
    model.save_pretrained(folder)
    words = ["<pad>", "<unk>", *numbered_words(38)]
    word_tokenizer(words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def save_text(file: Path) -> Path:
    words = torch.randint(0, 38, (100, 10), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("\n".join(" ".join(f"w{word}" for word in line) for line in words))
    return file


LAUNCHERS = {
    "train": ["accelerate", "launch", "--num_processes", "2", "--multi_gpu"],
    "restore": ["torchrun", "--nproc-per-node", "2"],
}
MODULES = {"accelerate": ["accelerate.commands.accelerate_cli"], "torchrun": ["torch.distributed.run"]}


def launch_two(*words: str) -> None:
    """Start two processes on the CPU, by accelerate's launcher or torch's own."""
    program, *options = LAUNCHERS[words[0]]
    options += ["--main_process_port" if program == "accelerate" else "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", *MODULES[program], *options, "-m", "peft_variator", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Wrote") == 1, "one process writes and tells"


def result(folder: Path) -> tuple[list[float], dict[str, Any]]:
    record = json.loads((folder / "training.json").read_text())
    return [line["loss"] for line in record["log"] if "loss" in line], record["facts"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "restore"])
def test_two_processes_do_what_one_does(tmp_path: Path, command: str) -> None:
    model = save_model(tmp_path / "model", pruned=command == "restore")
    words = [command, str(model), "--data", str(save_text(tmp_path / "text.txt")), *QUICK]
    words += ["--teacher", str(save_model(tmp_path / "dense", pruned=False))] if command == "restore" else []
    one = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "one"), "--batch-size", "4"])
    assert one.exit_code == 0, one.stderr
    launch_two(*words, "-o", str(tmp_path / "two"), "--batch-size", "2")
    (losses, facts), (expected, expected_facts) = (result(tmp_path / name) for name in ("two", "one"))
    assert len(losses) == 4
    # Adam makes something of nothing: gradients that are rounding errors alone move weights as far as any other.
    assert losses == pytest.approx(expected, rel=1e-3)
    card = (tmp_path / "two" / "README.md").read_text()
    assert f"{' '.join(LAUNCHERS[command])} -m peft_variator {command} {model}" in card
    assert f"peft-variator {command} {model}" in (tmp_path / "one" / "README.md").read_text()
    assert facts["held_out"] == expected_facts["held_out"]
    for state in {"dense", "pruned"} & expected_facts.get("losses", {}).keys():
        assert facts["losses"][state] == pytest.approx(expected_facts["losses"][state], rel=1e-4)
