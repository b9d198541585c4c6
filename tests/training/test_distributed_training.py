"""Two processes started by `accelerate launch` do what one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import MODELS, train


SCRIPT = Path(__file__).parent / "distributed_run.py"


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


def run_on_two_processes(folder: Path) -> dict[str, Any]:
    """Run the script and read what it has written."""
    # `--multi_gpu` only says how processes are started; the run itself asks for the CPU.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", str(free_port())]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder), "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
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


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Batches of 8: 8 at once, or 2 processes that accumulate 2 × 2. Then the second half again from a checkpoint."""
    results = run_on_two_processes(tmp_path)
    for name in MODELS:
        one, two = train(tmp_path / "one" / name, name, 8), results[name]
        assert losses(two) == pytest.approx(losses(one), rel=1e-6)
        assert len(losses(one)) > 20
        torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-6, atol=1e-9)
        assert two["sums"][0].equal(two["sums"][1]), "both processes have the same weights"
        assert two["moved"] == {key for key in two["weights"] if "variator_" in key}
        ratios = two["ratios"][0]
        assert ratios == two["ratios"][1]
        assert ratios[::2] == ratios[1::2] == one["ratios"][0]
        assert set(ratios) == {2, 4}
    last, resumed = results[MODELS[-1]], results["resumed"]
    assert losses(resumed, start=2) == losses(last, start=2)
    torch.testing.assert_close(resumed["weights"], last["weights"], rtol=0, atol=0)
