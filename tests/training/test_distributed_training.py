"""Two processes do what one does, started by `accelerate launch` or not, their weights sharded by FSDP2 or not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import MODELS, base_of, train, work
from peft import PeftModel

from tests.processes import free_port, run_processes


SCRIPT = Path(__file__).parent / "distributed_run.py"
ROOT = Path(__file__).resolve().parents[2]


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Start the script on two processes."""
    # Both options only say how processes are started; the run itself asks for the CPU.
    how = ["--use_fsdp", "--fsdp_version", "2"] if words[-1].endswith("STATE_DICT") else ["--multi_gpu"]
    options = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, *options]
    return subprocess.run(
        [*command, "--main_process_port", str(free_port()), str(SCRIPT), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_launched(folder: Path, *words: str) -> dict[str, Any]:
    """Run the script and read what it has written."""
    done = launch(str(folder), "2", *words)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


def run_forked(folder: Path) -> dict[str, Any]:
    """The same in processes that a launcher has not started."""
    run_processes(work, str(folder))
    return torch.load(folder / "results.pt")


def losses(result: dict[str, Any], start: int = 0) -> list[float]:
    """All losses of training and evaluation after a step, except for those that hold the task loss of evaluation."""
    return [
        value
        for line in result["log"]
        for name, value in line.items()
        if line["step"] > start and ("loss" in name) and name != "train_loss" and not inexact(name)
    ]


def inexact(name: str) -> bool:
    """Losses that hold the task loss of a last batch that was filled up with examples used twice, as in `Trainer`."""
    return name.startswith(("eval_loss", "eval_task_loss"))


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """What two processes did is what one did, and both have the result."""
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    assert len(losses(one)) > 10
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-6, atol=1e-8)
    assert two["sums"][0].equal(two["sums"][1]), "both processes have the same weights"
    assert two["moved"] == {key for key in two["weights"] if "variator_" in key or "sparse_low_rank_" in key}


def check_resumed(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    """A run that went on from its middle ends where the whole one did."""
    assert losses(resumed, start=2) == losses(whole, start=2)
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)


def check_saved(folder: Path, name: str, result: dict[str, Any]) -> None:
    """The adapter in a folder is whole: a fresh base with it has the weights of the run."""
    model = PeftModel.from_pretrained(base_of(name), folder, autocast_adapter_dtype=False)
    found = dict(model.named_parameters())
    assert found.keys() == result["weights"].keys()
    for key in result["moved"]:
        torch.testing.assert_close(found[key].detach(), result["weights"][key], rtol=0, atol=0)


@pytest.mark.parametrize("run", [run_forked, pytest.param(run_launched, marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(run: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    """Batches of 8: 8 at once, or 2 processes that accumulate 2 × 2. Then the second half again from a checkpoint."""
    results = run(tmp_path)
    for name in MODELS:
        one, two = train(tmp_path / "one" / name, name, 8), results[name]
        check_same(one, two)
        assert two["share"] == 1
        check_saved(tmp_path / name / "adapter", name, two)
        if name == "llama":
            continue
        ratios = two["ratios"][0]
        assert ratios == two["ratios"][1]
        assert ratios[::2] == ratios[1::2] == one["ratios"][0]
        assert set(ratios) == {2, 4}
    for name in ("gpt2", "llama"):
        check_resumed(results[name], results[f"{name}, resumed"])


@pytest.mark.slow
@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_sharded_weights_do_what_whole_ones_do(tmp_path: Path, state_dict_type: str) -> None:
    """The same by FSDP2, whose checkpoints are whole or in shards; the adapters saved beside are always whole."""
    results = run_launched(tmp_path, state_dict_type)
    for name in MODELS:
        two = results[name]
        check_same(train(tmp_path / "one" / name, name, 8), two)
        assert two["share"] == pytest.approx(0.5, abs=0.01)
        check_resumed(two, results[f"{name}, resumed"])
        check_saved(tmp_path / name / "adapter", name, two)
        check_saved(tmp_path / name / "checkpoint-4", name, two)
        shards = [path.name for path in (tmp_path / name / "checkpoint-4").glob("pytorch_model_fsdp*/*.distcp")]
        assert len(shards) == (2 if state_dict_type.startswith("SHARDED") else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("gpt2",), ("llama", "SHARDED_STATE_DICT")], ids=["plugin, DDP", "SparseLoRA, FSDP2"]
)
def test_a_process_that_dies_ends_the_job(tmp_path: Path, words: tuple[str, ...]) -> None:
    """The other one waits for its gradients, or its share of the weights, and is not left waiting."""
    start = time.monotonic()
    done = launch(str(tmp_path), "2", "die", *words)
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr
    assert time.monotonic() - start < 120
    assert not (tmp_path / "results.pt").exists()
    assert not (tmp_path / words[0] / "adapter").exists()
