"""`peft-variator bench`: how much faster a plugin makes a model, beside how much faster it could."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from .console import Reporter, option_words
from .saved_plugin import open_plugin


__all__ = ["bench", "find_subject", "warn_about_load"]

# Options that are named as in the other commands, unlike the fields of the settings.
DEFAULT_RATIOS = [2, 4, 8]
OPTIONS = {"ratios": "ratio", "batch": "batch-size"}


def bench(settings: BenchmarkSettings, reporter: Reporter) -> None:
    """Measure and tell; see [`run_benchmark`]."""
    reporter.check()
    report = _run(settings, reporter)
    reporter.write_json(report.to_json())
    if reporter.png is not None:
        save_plot(report, reporter.png)
        reporter.say(f"Wrote {reporter.png}.")
    _show(report, reporter)


def find_subject(model: str | None, adapter: str | None) -> tuple[str, list[int]]:
    """The base that is measured, and the ratios where none are named.

    Args:
        model: what was named as the model, if anything.
        adapter: folder or Hub name of a saved plugin; `None`: a fresh one is measured.

    Raises:
        OSError: there is no such adapter, or no such base as it names.
        ValueError: no model is named, or a folder with an adapter alone is named as one.
    """
    if model is not None and Path(model, "adapter_config.json").is_file() and not Path(model, "config.json").is_file():
        raise ValueError(
            f"{model!r} holds an adapter, not a model. To measure it on its base, run: "
            f"{shlex.join(['peft-variator', 'bench', '--adapter', model])}"
        )
    if adapter is not None:
        saved = open_plugin(adapter, model)
        if model is None:
            saved.check_base(f"as MODEL: {shlex.join(['peft-variator', 'bench', 'FOLDER', '--adapter', adapter])}")
        return saved.base, saved.ratios
    if model is None:
        raise ValueError("Name a model to measure a fresh plugin on, or a saved plugin with --adapter DIR.")
    return model, DEFAULT_RATIOS


def _run(settings: BenchmarkSettings, reporter: Reporter) -> BenchmarkReport:
    columns = [TextColumn("{task.description}"), *Progress.get_default_columns()[1:2]]
    # What differs from the defaults, and the device, whose default depends.
    words = ["peft-variator", "bench", settings.model, *option_words(settings, {"device"}, {"model"}, OPTIONS)]
    with reporter.progress(*columns, MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task(f"Measuring {settings.model} on {settings.device}", total=count_steps(settings))
        return run_benchmark(settings, command=shlex.join(words), on_step=lambda: progress.advance(bar))


def _show(report: BenchmarkReport, reporter: Reporter) -> None:
    reporter.show_table(make_table(report))
    _show_packed_layers(report.packed_layers, reporter)
    if report.float_corrections:
        names = report.float_corrections
        reporter.warn(
            f"The base is quantised, and the plugin's correction runs in floating point in {len(names)} layers: "
            f"{', '.join(names)}. In Python peft_variator.quantize_plugin quantises it."
        )
    for plugin in report.plugins:
        if not report.pays(plugin):
            saved = report.flops_saved(plugin)
            work = f"{saved:.1%} of the FLOPs saved" if saved > 0 else f"{-saved:.1%} more FLOPs"
            reporter.warn(
                f"At {plugin.name} it does not pay here: {report.speedup(plugin).median:.2f} times as fast as the "
                f"base, with {work}. Try a larger k, longer inputs, or a narrower correction; in Python "
                "model.set_min_tokens(n) has calls that are too small run the base."
            )
    warn_about_load(report.environment, reporter)
    model, adapter = report.settings["model"], report.settings["adapter"]
    ratios = ",".join(str(ratio) for ratio in report.settings["ratios"])
    weights = "random, which costs no speed" if adapter is None else f"those of {adapter}"
    reporter.say(
        f"Base and plugin ran in turn in one process. The plugin's weights were {weights}.", f"Again: {report.command}"
    )
    if report.settings["length"] is None and report.settings["task"] != "vision":
        return  # sound, which the other commands do not read
    if adapter is not None:
        named = [] if open_plugin(adapter).base == model else ["--base", model]
        evaluating = shlex.join(["peft-variator", "evaluate", adapter, *named, "--ratio", ratios])
        reporter.say(f"Its quality beside its speed on texts of yours: {evaluating} --data FILE")
    elif has_weights(model):
        merging = [
            str(ratio) for ratio in report.settings["ratios"] if ratio > 1
        ]  # k = 1 is the base: nothing to train
        named = ["--ratio", ",".join(merging)] if merging else []
        training = shlex.join(["peft-variator", "train", model, *named, "--output", "plugin"])
        reporter.say(f"To train a plugin that keeps the quality, give data of yours: {training} --data FILE")


def warn_about_load(environment: Mapping[str, Any], reporter: Reporter) -> None:
    """Tell that other programs kept the machine busy while times were taken, if they did."""
    if was_busy(environment):
        reporter.warn(
            f"Other programs kept {environment['cpu_in_use']:.0%} of the cores busy when the run began: these "
            "figures are not to be trusted. Run again when the machine is idle."
        )


def _show_packed_layers(paths: Mapping[str, str], reporter: Reporter) -> None:
    """Say which product the packed layers run and why; those that do the same are named together."""
    for path in dict.fromkeys(paths.values()):
        names = [name for name in paths if paths[name] == path]
        reporter.say(f"{len(names)} of {len(paths)} packed 2:4 layers: {path}. They are: {', '.join(names)}.")
