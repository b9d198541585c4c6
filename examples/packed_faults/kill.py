"""Kill packing, unpacking, merging and saving with SIGKILL at random moments, and look at what is left.

    python examples/packed_faults/kill.py

Every round forks a child that works, and kills it after a random time. The target has to be whole or absent and the
sources have to be unchanged. Some of the killed runs are then finished. `save_pretrained` itself writes into the final
folder: there, what is left has to be whole, absent, or an error when it is loaded.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from folders import contents, make_folders
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peft_variator.bases import merge_checkpoint, pack_checkpoint, save_base, unpack_checkpoint
from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


RESULTS = Path(__file__).resolve().parent / "results" / "kill.json"
Work = Callable[[Path], object]
console = Console(soft_wrap=True, highlight=False)


def start(work: Callable[[], object]) -> int:
    """Run `work` in a child; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def duration_of(work: Callable[[], object]) -> float:
    """Seconds that `work` takes in a child."""
    started = time.monotonic()
    os.waitpid(start(work), 0)
    return time.monotonic() - started


def kill_at_random(work: Callable[[], object], seconds: float) -> bool:
    """Run `work` in a child and kill it after `seconds`; returns whether it was still running."""
    child = start(work)
    time.sleep(seconds)
    running = os.waitpid(child, os.WNOHANG)[0] == 0
    if running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return running


class Rounds:
    """Rounds of one kind of work.

    Args:
        name: of the work.
        sources: folder with all sources.
        work: makes the folder that it is given.
    """

    def __init__(self, name: str, sources: Path, work: Work) -> None:
        self.name, self.sources, self.work = name, sources, work
        self.folder = sources.parent / f"{name}-rounds"
        self.target = self.folder / "target"
        work(self.folder / "first")  # slower than the ones to come
        shutil.rmtree(self.folder / "first")
        self.duration = duration_of(lambda: work(self.folder / "whole"))
        self.whole, self.before = contents(self.folder / "whole"), contents(sources)
        self.outcomes: Counter[str] = Counter()

    def run(self, rounds: int, seed: int) -> dict[str, Any]:
        """Kill `rounds` times; the counts of what was found."""
        generator = random.Random(f"{self.name} {seed}")
        for _ in range(rounds):
            seconds = generator.uniform(0, 1.5 * self.duration)
            self.outcomes["killed while running"] += kill_at_random(lambda: self.work(self.target), seconds)
            self._look(finish=generator.random() < 0.5)
        console.print(f"{self.name}: {rounds} rounds of {self.duration:.2f} s: {dict(self.outcomes)}")
        return {"rounds": rounds, "seconds_unkilled": self.duration, **dict(sorted(self.outcomes.items()))}

    def _look(self, finish: bool) -> None:
        if contents(self.sources) != self.before:
            raise ValueError(f"{self.name} changed its source.")
        if not self.target.exists():
            self.outcomes["target absent"] += 1
            if finish:
                self.outcomes["then finished"] += 1
                self.work(self.target)
                self._check_whole("finishing a killed run")
        elif self.name == "save_pretrained":
            self.outcomes[_what_is_left(self.target, self.whole)] += 1
        else:
            self._check_whole("killing")
            self.outcomes["target whole"] += 1
        shutil.rmtree(self.target, ignore_errors=True)
        left = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".target.partial")]
        if left != ["whole"]:
            raise ValueError(f"{self.name} left {left}.")

    def _check_whole(self, after: str) -> None:
        if contents(self.target) != self.whole:
            raise ValueError(f"{self.name}: after {after}, the target is neither whole nor absent.")


def _what_is_left(target: Path, whole: dict[str, str]) -> str:
    """What loading finds in a folder that may be half written."""
    if contents(target) == whole:
        return "target whole"
    try:
        AutoModelForCausalLM.from_pretrained(target)
    except (OSError, ValueError):
        return "target partial, and an error to load"
    raise ValueError("save_pretrained left a folder that is not whole, and it loads.")


def main(
    rounds: Annotated[int, typer.Option(help="Of each kind of work.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the counts.")] = RESULTS,
) -> None:
    """Kill every kind of work and write the counts."""
    torch.set_num_threads(1)  # children of a process with a pool of threads would wait for them
    logging.disable_progress_bar()  # their lock is shared with children, and one that is killed never gives it back
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder, "sources")
        make_folders(sources, shard_size="60KB")
        dense, packed, adapter = sources / "dense", sources / "packed", sources / "adapter"
        model = AutoModelForCausalLM.from_pretrained(packed)
        works: dict[str, Work] = {
            "pack": lambda target: pack_checkpoint(dense, target),
            "unpack": lambda target: unpack_checkpoint(packed, target),
            "merge": lambda target: merge_checkpoint(packed, adapter, target),
            "save_base": lambda target: save_base(model, target, max_shard_size="30KB"),
            "save_pretrained": lambda target: model.save_pretrained(target, max_shard_size="30KB"),
        }
        counts = {name: Rounds(name, sources, work).run(rounds, seed) for name, work in works.items()}
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(torch.device("cpu")),
        "seed": seed,
        "counts": counts,
    }
    write_text(output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
