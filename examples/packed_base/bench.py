"""Packed against dense: memory and time of loading, of a prefill, of one token, of a training step.

    python examples/packed_base/bench.py             # --quick to see that it runs

Every row is measured in processes of its own, one a round, and the rows take turns. A figure is divided by that of
the dense bfloat16 row of the same round.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_models import FOLDERS, make_folders, size_of
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from peft_variator.bases.file_checks import SWITCH
from peft_variator.cli.console import reported
from peft_variator.files import write_text
from peft_variator.profiling import Spread, describe_environment, num_threads, speedup


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Row:
    """What is loaded and how.

    Args:
        folder: one of `FOLDERS`.
        unpacked: of `load_base`; None for a dense model.
        adapter: what is trained above it; None for inference alone.
    """

    folder: str
    unpacked: str | None = None
    adapter: str | None = None

    @property
    def reference(self) -> str:
        """The row that this one is divided by."""
        return "dense bfloat16" if self.adapter is None else "dense bfloat16, LoRA"


ROWS = {
    "dense bfloat16": Row("dense-bfloat16"),
    "dense float32": Row("dense-float32"),
    "packed bfloat16": Row("packed-bfloat16", "forward"),
    "packed bfloat16, kept unpacked": Row("packed-bfloat16", "always"),
    "dense bfloat16, LoRA": Row("dense-bfloat16", None, "lora"),
    "dense float32, LoRA": Row("dense-float32", None, "lora"),
    "dense bfloat16, SparseLoRA": Row("dense-bfloat16", None, "sparse-lora"),
    "packed bfloat16, LoRA": Row("packed-bfloat16", "forward", "lora"),
    "packed bfloat16, SparseLoRA": Row("packed-bfloat16", "forward", "sparse-lora"),
}


@dataclass(frozen=True)
class Settings:
    """What is measured; see the options of `main`."""

    length: int
    rank: int
    rounds: int
    samples: int
    min_seconds: float
    threads: int | None
    quick: bool
    rows: tuple[str, ...] = tuple(ROWS)


def measure_row(home: Path, row: Row, settings: Settings) -> dict[str, float]:
    """Figures of one process; where nothing is trained, also of one that loads from files out of the cache, and of one
    that loads files that were checked before and have not changed."""
    figures = run_process(home, row, settings)
    if row.adapter is None:
        for prefix in ("cold", "unchanged"):
            more = run_process(home, row, settings, f"--{prefix}")
            figures |= {name: value for name, value in more.items() if name.startswith(f"{prefix}_")}
    return figures


def run_process(home: Path, row: Row, settings: Settings, *flags: str) -> dict[str, float]:
    """Start bench_row.py and read its figures; but with `--unchanged` it checks everything that it loads.

    Raises:
        RuntimeError: it failed; the message has the end of what it wrote.
    """
    options: dict[str, object] = {
        "unpacked": row.unpacked,
        "adapter": row.adapter,
        "length": settings.length,
        "rank": settings.rank,
        "samples": settings.samples,
        "min-seconds": settings.min_seconds,
        "threads": settings.threads,
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "row.json")
        command = [sys.executable, str(HERE / "bench_row.py"), str(home / row.folder), str(output), *words, *flags]
        environment = os.environ | {SWITCH: "1" if "--unchanged" in flags else "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr[-2000:]}")
        return json.loads(output.read_text())


def summarise(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Quartiles over the rounds of every figure, and of its quotient with the reference's in the same round."""
    found: dict[str, Any] = {}
    for name, rounds in samples.items():
        reference = samples[ROWS[name].reference]
        found[name] = {}
        for figure in rounds[0]:
            values, base = ([each[figure] for each in chosen] for chosen in (rounds, reference))
            times = None if min(base) <= 0 else asdict(speedup(values, base))
            found[name][figure] = {"quartiles": asdict(Spread.of(values)), "times_dense": times, "samples": values}
    return found


def command_of(model: str, settings: Settings) -> str:
    """The command line of these settings, wherever the models and the figures are kept."""
    words = ["--model", model]
    for name in ("length", "rank", "rounds", "samples", "threads"):
        if (value := getattr(settings, name)) is not None and not settings.quick:
            words += [f"--{name}", str(value)]
    if settings.rows != tuple(ROWS):
        words += [word for name in settings.rows for word in ("--row", name)]
    return shlex.join(["python", "examples/packed_base/bench.py", *words, *["--quick"] * settings.quick])


def measure(model: str, work: Path, settings: Settings, progress: Progress) -> dict[str, Any]:
    """All rows of a model."""
    bar = progress.add_task(f"{model}: making the models", total=settings.rounds * len(settings.rows))
    home = make_folders(model, work, settings.quick)
    for name in settings.rows:
        if ROWS[name].adapter is None:
            run_process(home, ROWS[name], settings, "--unchanged")  # checks the files, and has them remembered
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in settings.rows}
    for number in range(settings.rounds):
        for name in reversed(settings.rows) if number % 2 else settings.rows:
            progress.update(bar, description=f"{model}: {name}")
            samples[name].append(measure_row(home, ROWS[name], settings))
            progress.advance(bar)
    files = {folder: size_of(home / folder) for folder in FOLDERS}
    return {"model": model, "file_bytes": files, "rows": summarise(samples)}


def main(
    model: Annotated[list[str], typer.Option(help="Named shape of a causal model; may be repeated.")] = [  # noqa: B006
        "qwen2.5-0.5b",
        "llama-3.2-1b",
    ],
    length: Annotated[int, typer.Option(min=2, help="Tokens of the prefill and of the step.")] = 512,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Processes of each row.")] = 5,
    samples: Annotated[int, typer.Option(min=2, help="Timed samples in a process.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.")] = None,
    row: Annotated[list[str] | None, typer.Option(help=f"Rows, besides their references: {'; '.join(ROWS)}.")] = None,
    work: Annotated[Path | None, typer.Option(help="Keeps the models (17 GB); else they go when it is done.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures, a file a model.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="One tiny model, 16 tokens, 2 rounds.")] = False,
) -> None:
    """Measure every row in turn and write the figures."""
    for name in row or ():
        if name not in ROWS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(map(repr, ROWS))}.")
    wanted = {*(row or ROWS), *(ROWS[name].reference for name in row or ())}
    rows = tuple(name for name in ROWS if name in wanted)
    settings = Settings(length, rank, rounds, samples, 0.2, threads, quick, rows)
    if quick:
        settings, model = Settings(16, rank, 2, 2, 0.0, threads, quick, rows), model[:1]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with reported(), num_threads(threads), tempfile.TemporaryDirectory() as scratch:
        for name in model:
            facts = {"command": command_of(name, settings), "settings": asdict(settings)}
            facts["environment"] = describe_environment(torch.device("cpu"))
            with Progress(*columns, console=Console(stderr=True)) as progress:
                facts |= measure(name, work or Path(scratch), settings, progress)
            file = output / f"bench-{name}.json"
            write_text(file, json.dumps(facts, indent=2) + "\n")
            Console().print(f"{file} is written. Next: python examples/packed_base/render.py", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
