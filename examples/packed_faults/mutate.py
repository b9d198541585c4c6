"""Damage the files of packed models 500 times and see what reading them does.

    python examples/packed_faults/mutate.py

Every damaged file is read by a process of its own, under limits of memory and time: loaded, unpacked, and merged with
an adapter. Files of this package have checksums, so that each has to be a clear error, or to give the same numbers.
Files of others have none: a flipped value is a value like any other there, and everything else has to be an error.
"""

from __future__ import annotations

import json
import os
import random
import resource
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
from damages import DAMAGES
from folders import make_folders
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_variator import load_base
from peft_variator.bases import CheckpointError, merge_checkpoint, unpack_checkpoint
from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


RESULTS = Path(__file__).resolve().parent / "results" / "mutate.json"
MEMORY, SECONDS = 256 * 2**20, 60.0
OUTCOMES = ["clear error", "same numbers", "other numbers", "another error"]
console = Console(soft_wrap=True, highlight=False)
Read = Callable[[Path, Path], dict[str, Tensor]]


def load(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """All tensors of the model as it is loaded."""
    return dict(load_base(folder).state_dict())


def unpack(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """All tensors of the model after it is made dense on disk."""
    unpack_checkpoint(folder, scratch / "unpacked")
    return dict(AutoModelForCausalLM.from_pretrained(scratch / "unpacked").state_dict())


def merge(folder: Path, scratch: Path) -> dict[str, Tensor]:
    """All tensors of the model after an adapter is merged on disk."""
    merge_checkpoint(folder, scratch.parent / "sources" / "adapter", scratch / "merged")
    return dict(AutoModelForCausalLM.from_pretrained(scratch / "merged").state_dict())


READS: dict[str, Read] = {"load": load, "unpack": unpack, "merge": merge}


def outcome_of(read: Read, folder: Path, scratch: Path, wanted: dict[str, Tensor]) -> str:
    """One of `OUTCOMES`. An error is clear if it is one of ours and names the file."""
    try:
        found = read(folder, scratch)
    except CheckpointError as error:
        return "clear error" if "model.safetensors" in str(error) else "another error"
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "another error"
    # bytes, since a flipped bit can make a NaN
    same = found.keys() == wanted.keys() and all(
        torch.equal(found[name].contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8))
        for name in wanted
    )
    return "same numbers" if same else "other numbers"


def in_a_child(work: Callable[[], str]) -> tuple[str, int]:
    """What `work` says in a child with limits, or how that one ended; and by how many KiB its memory grew."""
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = OUTCOMES.index(work())
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(found + len(OUTCOMES) * min(grown // 4096, 50))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            if os.WIFSIGNALED(status):
                return f"crash ({signal.Signals(os.WTERMSIG(status)).name})", 0
            code = os.waitstatus_to_exitcode(status)
            return OUTCOMES[code % len(OUTCOMES)], 4 * (code // len(OUTCOMES))
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang", 0


def make_damaged(source: Path, scratch: Path, index: int, seed: int) -> str:
    """Copy a model with one file damaged; the name of the damage."""
    damage = DAMAGES[index % len(DAMAGES)]
    generator = random.Random(f"{source.name} {index} {seed}")
    file = generator.choice(sorted(source.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    damage(data, generator)
    shutil.copytree(source, scratch / "model")
    (scratch / "model" / file.name).write_bytes(data)
    return damage.__name__


def run(source: Path, reads: list[str], count: int, seed: int) -> dict[str, Any]:
    """Damage `count` times and read each in every way; outcomes by way and by damage."""
    scratch = source.parent.parent / "scratch"
    scratch.mkdir()
    wanted = {name: READS[name](source, scratch) for name in reads}
    outcomes: dict[str, dict[str, Counter[str]]] = {name: {} for name in reads}
    largest = 0
    for index in range(count):
        shutil.rmtree(scratch)
        scratch.mkdir()
        damage = make_damaged(source, scratch, index, seed)
        for name in reads:
            outcome, grown = in_a_child(
                lambda name=name: outcome_of(READS[name], scratch / "model", scratch, wanted[name])
            )
            largest = max(largest, grown)
            outcomes[name].setdefault(damage, Counter())[outcome] += 1
            if outcome not in OUTCOMES[:2]:
                console.print(f"{source.name}, file {index}, {damage}, {name}: {outcome}")
    shutil.rmtree(scratch)
    return {"files": count, "largest_growth_mib": largest, "outcomes": outcomes}


def main(
    count: Annotated[int, typer.Option(help="Damaged files of this package's packed model.")] = 500,
    foreign: Annotated[int, typer.Option(help="Damaged files of the same model without checksums.")] = 140,
    seed: Annotated[int, typer.Option(help="Of the damages.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the counts.")] = RESULTS,
) -> None:
    """Damage, read, and write the counts."""
    torch.set_num_threads(1)  # children of a process with a pool of threads would wait for them
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder, "sources")
        make_folders(sources, shard_size="1GB")
        counts = {
            "packed": run(sources / "packed", list(READS), count, seed),
            "foreign, without checksums": run(sources / "foreign", ["load"], foreign, seed),
        }
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": describe_environment(torch.device("cpu")),
        "seed": seed,
        "memory_limit_mib": MEMORY // 2**20,
        "time_limit_seconds": SECONDS,
        "counts": counts,
    }
    write_text(output, json.dumps(report, indent=2) + "\n")
    console.print_json(data=counts)


if __name__ == "__main__":
    typer.run(main)
