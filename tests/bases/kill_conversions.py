"""Kills conversions with SIGKILL at random moments and checks what is left: python -m tests.bases.kill_conversions.

Every round forks a child that converts, kills it after a random time, and checks that the target is whole or absent
and the source unchanged. Some of the killed runs are then finished.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peft_variator.bases import pack_checkpoint, unpack_checkpoint
from tests.bases.models import contents, tiny_llama


def kill_at_random(convert: Callable[[], object], seconds: float) -> bool:
    """Run `convert` in a child and kill it after `seconds`; returns whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            convert()
        finally:
            os._exit(0)
    time.sleep(seconds)
    running = os.waitpid(child, os.WNOHANG)[0] == 0
    if running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return running


def check_rounds(name: str, source: Path, convert: Callable[[Path], object], rounds: int, seed: int) -> None:
    """Kill `convert(target)` `rounds` times."""
    folder = source.parent / f"{name}-rounds"
    whole_folder = folder / "whole"
    started = time.monotonic()
    convert(whole_folder)
    duration = time.monotonic() - started
    whole, before, target = contents(whole_folder), contents(source), folder / "target"
    generator, killed, resumed = random.Random(seed), 0, 0
    for _ in range(rounds):
        while_running = kill_at_random(lambda: convert(target), generator.uniform(0, 1.2 * duration))
        killed += while_running
        assert contents(source) == before, "the source changed"
        if target.exists():
            assert contents(target) == whole, "the target is not whole"
            shutil.rmtree(target)
        elif generator.random() < 0.5:
            resumed += 1
            convert(target)
            assert contents(target) == whole, "a resumed run gives something else"
            shutil.rmtree(target)
    assert {entry.name for entry in folder.iterdir()} <= {"whole", ".target.partial"}
    print(f"{name}: {rounds} rounds of {duration:.2f} s, {killed} killed while running, {resumed} then finished")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # children of a process with a pool of threads would wait for them
    with tempfile.TemporaryDirectory() as folder:
        dense, packed = Path(folder, "dense"), Path(folder, "packed")
        tiny_llama(width=64).save_pretrained(dense, max_shard_size="30KB")
        pack_checkpoint(dense, packed)
        check_rounds("pack", dense, lambda target: pack_checkpoint(dense, target), arguments.rounds, arguments.seed)
        check_rounds(
            "unpack", packed, lambda target: unpack_checkpoint(packed, target), arguments.rounds, arguments.seed
        )


if __name__ == "__main__":
    main()
