"""Measure everything that docs/benchmark.md shows, one process after the other, and render the page.

    python benchmarks/run_all.py                 # all CPU cases, on 2 threads
    python benchmarks/run_all.py --gpu           # all GPU cases
    python benchmarks/run_all.py bert-base-8x128 # one case
    python benchmarks/run_all.py --list          # the commands, without running them

Every case is measured by several processes, which take turns with those of the other cases: what a process is lucky or
unlucky with (where its memory lies, what the machine does in that minute) differs more between them than from round to
round within one. A process whose figures are there is skipped; remove its file to measure again.

Leave the machine alone while it runs: a busy machine measures itself.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


__all__ = ["CPU_CASES", "GPU_CASES", "command", "main", "output"]

HERE = Path(__file__).resolve().parent
CPU = "--device cpu --dtype float32 --threads 2 --ratios 2,4,8"
GPU = "--device cuda --dtype bfloat16 --ratios 2,4,8 --rounds 30"

CPU_CASES = {
    "bert-base-8x128": f"bert-base --batch 8 --length 128 --rounds 8 --with-disabled {CPU}",
    "bert-base-2x512": f"bert-base --batch 2 --length 512 --rounds 8 {CPU}",
    "bert-base-16x128-uneven": f"bert-base --batch 16 --length 128 --lengths uneven --rounds 8 {CPU}",
    "minilm-l6-32x128": f"minilm-l6 --batch 32 --length 128 --rounds 8 {CPU}",
    "minilm-l6-32x128-uneven": f"minilm-l6 --batch 32 --length 128 --lengths uneven --rounds 8 {CPU}",
    "t5-base-encoder-8x128": f"t5-base-encoder --batch 8 --length 128 --rounds 8 {CPU}",
    "t5-base-encoder-8x128-uneven": f"t5-base-encoder --batch 8 --length 128 --lengths uneven --rounds 8 {CPU}",
    "vit-base-8": f"vit-base --batch 8 --rounds 8 {CPU}",
    "qwen2.5-0.5b-1x512": f"qwen2.5-0.5b --batch 1 --length 512 --rounds 6 --with-disabled {CPU}",
    "qwen2.5-0.5b-1x2048": f"qwen2.5-0.5b --batch 1 --length 2048 --rounds 4 {CPU}",
    "qwen2.5-0.5b-4x512-uneven": f"qwen2.5-0.5b --batch 4 --length 512 --lengths uneven --rounds 4 {CPU}",
}
GPU_CASES = {
    "gpu-bert-base-64x128": f"bert-base --batch 64 --length 128 {GPU}",
    "gpu-bert-base-64x128-uneven": f"bert-base --batch 64 --length 128 --lengths uneven {GPU}",
    "gpu-llama-3.2-1b-1x2048": f"llama-3.2-1b --batch 1 --length 2048 --with-disabled {GPU}",
    "gpu-llama-3.2-1b-8x2048": f"llama-3.2-1b --batch 8 --length 2048 {GPU}",
    "gpu-qwen2.5-7b-1x2048": f"qwen2.5-7b --batch 1 --length 2048 {GPU}",
    "gpu-qwen2.5-7b-4x2048": f"qwen2.5-7b --batch 4 --length 2048 {GPU}",
}


def output(name: str, number: int) -> Path:
    """The file that process `number` of a case writes."""
    return HERE / "results" / f"{name}.{number}.json"


def command(name: str, number: int) -> list[str]:
    """The command of process `number`, counted from 1, of a case.

    Raises:
        typer.BadParameter: there is no such case.
    """
    cases = CPU_CASES | GPU_CASES
    if name not in cases:
        raise typer.BadParameter(f"There is no case {name!r}. Choose from: {', '.join(cases)}.")
    return ["peft-variator", "bench", *cases[name].split(), "--json", str(output(name, number))]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Cases; left out: all of the CPU, or of the GPU.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Take the GPU cases if no case is named.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="How many measure each case.")] = 3,
    list_only: Annotated[bool, typer.Option("--list", help="Print the commands and do nothing.")] = False,
) -> None:
    """Run the cases one after the other, then again, then render the page."""
    turns = [(name, number + 1) for number in range(processes) for name in names or (GPU_CASES if gpu else CPU_CASES)]
    commands = {turn: command(*turn) for turn in turns}
    for position, (turn, words) in enumerate(commands.items(), start=1):
        is_there = output(*turn).is_file() and not list_only
        typer.echo(f"[{position}/{len(commands)}] {shlex.join(words)}{' (is there, skipped)' if is_there else ''}")
        if not list_only and not is_there:
            subprocess.run(words, check=True)
    if not list_only:
        subprocess.run([sys.executable, str(HERE / "render.py")], check=True)


if __name__ == "__main__":
    typer.run(main)
