"""Measure everything that docs/benchmark.md shows, one process after the other, and render the page.

    python benchmarks/run_all.py                 # all CPU cases, on 2 threads
    python benchmarks/run_all.py --gpu           # all GPU cases
    python benchmarks/run_all.py bert-base-8x128 # one case
    python benchmarks/run_all.py --list          # the commands, without running them

Leave the machine alone while it runs: a busy machine measures itself.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


__all__ = ["CPU_CASES", "GPU_CASES", "command", "main"]

HERE = Path(__file__).resolve().parent
CPU = "--device cpu --dtype float32 --threads 2 --ratios 2,4,8"
GPU = "--device cuda --dtype bfloat16 --ratios 2,4,8 --rounds 30"

CPU_CASES = {
    "bert-base-8x128": f"bert-base --batch 8 --length 128 --rounds 20 --with-disabled {CPU}",
    "bert-base-2x512": f"bert-base --batch 2 --length 512 --rounds 20 {CPU}",
    "bert-base-16x128-uneven": f"bert-base --batch 16 --length 128 --lengths uneven --rounds 20 {CPU}",
    "minilm-l6-32x128": f"minilm-l6 --batch 32 --length 128 --rounds 20 {CPU}",
    "minilm-l6-32x128-uneven": f"minilm-l6 --batch 32 --length 128 --lengths uneven --rounds 20 {CPU}",
    "t5-base-encoder-8x128": f"t5-base-encoder --batch 8 --length 128 --rounds 20 {CPU}",
    "t5-base-encoder-8x128-uneven": f"t5-base-encoder --batch 8 --length 128 --lengths uneven --rounds 20 {CPU}",
    "vit-base-8": f"vit-base --batch 8 --rounds 20 {CPU}",
    "qwen2.5-0.5b-1x512": f"qwen2.5-0.5b --batch 1 --length 512 --rounds 15 --with-disabled {CPU}",
    "qwen2.5-0.5b-1x2048": f"qwen2.5-0.5b --batch 1 --length 2048 --rounds 8 {CPU}",
    "qwen2.5-0.5b-4x512-uneven": f"qwen2.5-0.5b --batch 4 --length 512 --lengths uneven --rounds 8 {CPU}",
}
GPU_CASES = {
    "gpu-bert-base-64x128": f"bert-base --batch 64 --length 128 {GPU}",
    "gpu-bert-base-64x128-uneven": f"bert-base --batch 64 --length 128 --lengths uneven {GPU}",
    "gpu-llama-3.2-1b-1x2048": f"llama-3.2-1b --batch 1 --length 2048 --with-disabled {GPU}",
    "gpu-llama-3.2-1b-8x2048": f"llama-3.2-1b --batch 8 --length 2048 {GPU}",
    "gpu-qwen2.5-7b-1x2048": f"qwen2.5-7b --batch 1 --length 2048 {GPU}",
    "gpu-qwen2.5-7b-4x2048": f"qwen2.5-7b --batch 4 --length 2048 {GPU}",
}


def command(name: str) -> list[str]:
    """The command of one case, which writes `benchmarks/results/NAME.json`.

    Raises:
        typer.BadParameter: there is no such case.
    """
    cases = CPU_CASES | GPU_CASES
    if name not in cases:
        raise typer.BadParameter(f"There is no case {name!r}. Choose from: {', '.join(cases)}.")
    output = HERE / "results" / f"{name}.json"
    return ["peft-variator", "bench", *cases[name].split(), "--json", str(output)]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Cases; left out: all of the CPU, or of the GPU.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Take the GPU cases if no case is named.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Print the commands and do nothing.")] = False,
) -> None:
    """Run the cases one after the other, then render the page."""
    commands = [command(name) for name in names or (GPU_CASES if gpu else CPU_CASES)]
    for number, words in enumerate(commands, start=1):
        typer.echo(f"[{number}/{len(commands)}] {shlex.join(words)}")
        if not list_only:
            subprocess.run(words, check=True)
    if not list_only:
        subprocess.run([sys.executable, str(HERE / "render.py")], check=True)


if __name__ == "__main__":
    typer.run(main)
