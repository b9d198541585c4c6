"""`peft-variator bench`: how much faster a plugin makes a model, beside how much faster it could."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..models import Task
from ..profiling import (
    SHAPES,
    BenchmarkReport,
    BenchmarkSettings,
    count_steps,
    make_table,
    run_benchmark,
    save_plot,
    was_busy,
)
from ..profiling.inputs import Lengths
from .console import open_console
from .errors import reported
from .outputs import check_outputs
from .ratios import parse_ratios


__all__ = ["bench"]

NEXT = "peft-variator train MODEL --data FILE --ratio 4 --output DIR"


def bench(
    model: Annotated[
        str, typer.Argument(help=f"Hub name, folder, path of a config.json, or one of: {', '.join(SHAPES)}.")
    ],
    ratios: Annotated[str, typer.Option(help="Compression ratios k, with commas between them.")] = "2,4,8",
    batch: Annotated[int, typer.Option(help="Sequences or images in a batch.")] = 8,
    length: Annotated[int | None, typer.Option(help="Tokens of the longest sequence (128). Not for images.")] = None,
    lengths: Annotated[
        Lengths, typer.Option(help="uneven: lengths are drawn from a quarter of --length up, and padded.")
    ] = "even",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of weights and activations.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="E.g. cpu or cuda:1; left out: a GPU if there is one.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed samples of each setting.")] = 10,
    min_seconds: Annotated[float, typer.Option(help="Short calls are repeated to fill a sample of so many.")] = 0.2,
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: as torch chooses.")] = None,
    task: Annotated[Task | None, typer.Option(help="Left out: read off the architecture.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Read only the configuration of MODEL and draw the weights.")
    ] = False,
    with_disabled: Annotated[
        bool, typer.Option("--with-disabled", help="Measure the plugin switched off, too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, plugin and inputs.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write samples and figures to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file; needs the extra 'plots'.")] = None,
) -> None:
    """Measure how much faster a Variator plugin makes MODEL, and how much of the ideal that is.

    The untouched model and the model with a plugin run in turn in one process. Causal models are measured on a
    prefill, encoder-decoders on the encoder and one decoder step.
    """
    with reported():
        check_outputs(json, png)
        settings = BenchmarkSettings(
            model=model,
            ratios=parse_ratios(ratios),
            batch=batch,
            length=length,
            lengths=lengths,
            dtype=dtype,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            rounds=rounds,
            min_seconds=min_seconds,
            threads=threads,
            task=task,
            random_weights=random_weights,
            with_disabled=with_disabled,
            seed=seed,
        )
        report = _run(settings)
        _write(report, json, png)
        _show(report)


def _command(settings: BenchmarkSettings) -> str:
    """The command line of these settings: what differs from the defaults, and the device, whose default depends."""
    words = ["peft-variator", "bench", settings.model]
    for option in fields(settings)[1:]:
        value, name = getattr(settings, option.name), "--" + option.name.replace("_", "-")
        if value is True:
            words.append(name)
        elif option.name == "device" or option.default is MISSING or value != option.default:
            words += [name, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def _run(settings: BenchmarkSettings) -> BenchmarkReport:
    columns = [TextColumn("{task.description}"), *Progress.get_default_columns()[1:2]]
    console = Console(stderr=True)
    with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"Measuring {settings.model} on {settings.device}", total=count_steps(settings))
        return run_benchmark(settings, command=_command(settings), on_step=lambda: progress.advance(bar))


def _write(report: BenchmarkReport, json: Path | None, png: Path | None) -> None:
    if json is not None:
        report.save(json)
        typer.echo(f"Wrote {json}.")
    if png is not None:
        save_plot(report, png)
        typer.echo(f"Wrote {png}.")


def _show(report: BenchmarkReport) -> None:
    open_console(120).print(make_table(report))
    _show_packed_layers(report.packed_layers)
    if was_busy(report.environment):
        typer.secho(
            f"Other programs kept {report.environment['cpu_in_use']:.0%} of the cores busy when the run began: these "
            "figures are not to be trusted. Run again when the machine is idle.",
            fg="yellow",
        )
    typer.echo("Base and plugin ran in turn in one process. The plugin's weights were random, which costs no speed.")
    typer.echo(f"Again: {report.command}")
    typer.echo(f"Next, train a plugin that keeps the quality: {NEXT}")


def _show_packed_layers(paths: Mapping[str, str]) -> None:
    """Say which product the packed layers run and why; those that do the same are named together."""
    for path in dict.fromkeys(paths.values()):
        names = [name for name in paths if paths[name] == path]
        typer.echo(f"{len(names)} of {len(paths)} packed 2:4 layers: {path}. They are: {', '.join(names)}.")
