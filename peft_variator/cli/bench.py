"""`peft-variator bench`: how much faster a plugin makes a model, beside how much faster it could."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..profiling import (
    BenchmarkReport,
    BenchmarkSettings,
    count_steps,
    has_weights,
    make_table,
    run_benchmark,
    save_plot,
    was_busy,
)
from .console import Reporter


__all__ = ["bench"]

# Options that are named as in the other commands, unlike the fields of the settings.
OPTIONS = {"ratios": "ratio", "batch": "batch-size"}


def bench(settings: BenchmarkSettings, reporter: Reporter) -> None:
    """Measure and tell; see [`run_benchmark`]."""
    reporter.check()
    if Path(settings.model, "adapter_config.json").is_file() and not Path(settings.model, "config.json").is_file():
        raise ValueError(
            f"{settings.model!r} holds an adapter. Name its base model: a fresh plugin on it is measured."
        )
    report = _run(settings, reporter)
    reporter.write_json(report.to_json())
    if reporter.png is not None:
        save_plot(report, reporter.png)
        reporter.say(f"Wrote {reporter.png}.")
    _show(report, reporter)


def _command(settings: BenchmarkSettings) -> str:
    """The command line of these settings: what differs from the defaults, and the device, whose default depends."""
    words = ["peft-variator", "bench", settings.model]
    for option in fields(settings)[1:]:
        value, name = getattr(settings, option.name), "--" + OPTIONS.get(option.name, option.name.replace("_", "-"))
        if value is True:
            words.append(name)
        elif option.name == "device" or option.default is MISSING or value != option.default:
            words += [name, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def _run(settings: BenchmarkSettings, reporter: Reporter) -> BenchmarkReport:
    columns = [TextColumn("{task.description}"), *Progress.get_default_columns()[1:2]]
    with reporter.progress(*columns, MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task(f"Measuring {settings.model} on {settings.device}", total=count_steps(settings))
        return run_benchmark(settings, command=_command(settings), on_step=lambda: progress.advance(bar))


def _show(report: BenchmarkReport, reporter: Reporter) -> None:
    reporter.show_table(make_table(report))
    _show_packed_layers(report.packed_layers, reporter)
    if was_busy(report.environment):
        reporter.warn(
            f"Other programs kept {report.environment['cpu_in_use']:.0%} of the cores busy when the run began: these "
            "figures are not to be trusted. Run again when the machine is idle."
        )
    reporter.say(
        "Base and plugin ran in turn in one process. The plugin's weights were random, which costs no speed.",
        f"Again: {report.command}",
    )
    model, ratios = report.settings["model"], ",".join(str(ratio) for ratio in report.settings["ratios"])
    if has_weights(model):
        training = shlex.join(["peft-variator", "train", model, "--ratio", ratios, "--output", "plugin"])
        reporter.say(f"To train a plugin that keeps the quality, give data of yours: {training} --data FILE")


def _show_packed_layers(paths: Mapping[str, str], reporter: Reporter) -> None:
    """Say which product the packed layers run and why; those that do the same are named together."""
    for path in dict.fromkeys(paths.values()):
        names = [name for name in paths if paths[name] == path]
        reporter.say(f"{len(names)} of {len(paths)} packed 2:4 layers: {path}. They are: {', '.join(names)}.")
