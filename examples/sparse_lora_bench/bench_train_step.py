"""Training step of SparseLoRA beside PEFT's LoRA and the paper's formulation, in one run: time and memory.

    python examples/sparse_lora_bench/bench_train_step.py --output results.json

All formulations adapt the same layers of one pruned base, whose weights they share, and are timed in turn. The floor
is what the exact gradient costs at least: the operations of the paper's formulation over those of a step of LoRA.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from formulations import FORMULATIONS, LORA, PLAIN, prune_at_random_
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import kept_bytes, make_batch, make_loss, step_flops

from peft_variator.cli.console import reported
from peft_variator.files import write_text
from peft_variator.profiling import (
    Candidate,
    Spread,
    build_model,
    describe_environment,
    find_task,
    load_config,
    make_training_step,
    num_threads,
    share_weights,
    speedup,
    time_alternately,
)


QUICK = {"num_hidden_layers": 2, "vocab_size": 1000}


@dataclass(frozen=True)
class Settings:
    """What is measured; see the options of `main`."""

    batch: int
    length: int
    rank: int
    sparsity: float
    rounds: int
    dtype: str
    device: str
    quick: bool


def measure(model: str, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Seconds a step (quartiles), their ratio to LoRA's, and the bytes that autograd keeps, by formulation."""
    torch.manual_seed(0)
    config = load_config(model)
    if settings.quick:
        config.update(QUICK)
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.dtype)
    task = find_task(model, config)
    base = build_model(model, config, task, dtype=dtype, device=device, random_weights=True)
    weights = prune_at_random_(base, settings.sparsity)
    loss = make_loss(model, base, make_batch(model, base, settings.batch, settings.length))
    models = {name: build(share_weights(base), settings.rank) for name, build in FORMULATIONS.items()}
    candidates = [Candidate(name, make_training_step(trained, loss)) for name, trained in models.items()]
    bar = progress.add_task(model, total=settings.rounds * len(candidates))
    seconds = time_alternately(candidates, settings.rounds, device=device, on_sample=lambda: progress.advance(bar))
    kept = {name: kept_bytes(trained, loss) for name, trained in models.items()}
    flops = {name: step_flops(models[name], loss) for name in (LORA, PLAIN)}
    return {
        "model": model,
        "adapted_weights": weights,
        "flops": flops,
        "floor_times_lora": flops[PLAIN] / flops[LORA],
        "formulations": {
            name: {
                "seconds": asdict(Spread.of(seconds[name])),
                "times_lora": asdict(speedup(seconds[name], seconds[LORA])),
                "kept_bytes": kept[name],
                "kept_bytes_a_weight_beyond_lora": (kept[name] - kept[LORA]) / weights,
                "samples": seconds[name],
            }
            for name in FORMULATIONS
        },
    }


def make_table(result: dict[str, Any], settings: Settings) -> Table:
    """A row a formulation; quartiles in brackets."""
    table = Table(
        title=f"{result['model']}, batch {settings.batch}×{settings.length}, {settings.dtype}",
        caption=f"By its operations the exact gradient takes {result['floor_times_lora']:.2f} × LoRA at least.",
    )
    for column in ("formulation", "seconds a step", "× LoRA", "kept MB", "kept bytes a weight beyond LoRA"):
        table.add_column(column, justify="left" if column == "formulation" else "right")
    for name, row in result["formulations"].items():
        seconds, times = row["seconds"], row["times_lora"]
        table.add_row(
            name,
            f"{seconds['median']:.3f} [{seconds['low']:.3f}–{seconds['high']:.3f}]",
            f"{times['median']:.2f} [{times['low']:.2f}–{times['high']:.2f}]",
            f"{row['kept_bytes'] / 1e6:.1f}",
            f"{row['kept_bytes_a_weight_beyond_lora']:.3f}",
        )
    return table


def main(
    model: Annotated[list[str], typer.Option(help="Named shape, or a config.json; may be repeated.")] = [  # noqa: B006
        "bert-base",
        "qwen2.5-0.5b",
    ],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 256,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the updates.")] = 8,
    sparsity: Annotated[float, typer.Option(min=0, max=1, help="Fraction of the weights that is 0.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=2, help="Samples of each formulation.")] = 11,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where it runs.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2 layers, 1×32 tokens, 2 rounds: to see it runs.")] = False,
) -> None:
    """Time a training step of every formulation and count what autograd keeps for its backward."""
    settings = Settings(batch, length, rank, sparsity, rounds, dtype, device, quick)
    if quick:
        settings = Settings(1, 32, rank, sparsity, 2, dtype, device, quick)
    console = Console()
    with reported(), num_threads(threads):
        environment = describe_environment(torch.device(device))
        with Progress(console=console) as progress:
            results = [measure(name, settings, progress) for name in model]
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "settings": asdict(settings),
            "environment": environment,
            "results": results,
        }
    for result in results:
        console.print(make_table(result, settings))
    if output is not None:
        write_text(output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
