"""Write the tables of docs/benchmark.md from the files in benchmarks/results/.

python benchmarks/render.py           # writes docs/benchmark.md
python benchmarks/render.py --check   # only says, by its exit status, whether the page is up to date
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from parts_table import parts_table
from rich.filesize import decimal

from peft_variator.files import write_text
from peft_variator.markdown import make_table, replace_between
from peft_variator.profiling import BenchmarkReport, Measurement, Spread


__all__ = ["main", "pool", "render"]

HERE = Path(__file__).resolve().parent
COLUMNS = ["model", "input", "k", "FLOPs saved", "ideal", "measured", "measured / ideal"]
PADDED_COLUMNS = ["ideal, pads computed", "measured / that"]
# Options that were renamed since some of the results were measured.
RENAMED = {"--ratios": "--ratio", "--batch": "--batch-size"}
COST_COLUMNS = ["base, ms", "with plugin, ms", "peak memory", "with plugin", "added parameters"]


def render(reports: list[BenchmarkReport]) -> str:
    """Markdown: one section a machine and dtype, one table for full and one for padded batches, then the commands."""
    if not reports:
        return "No results are committed yet."
    sections = []
    for heading, group in groupby(sorted(reports, key=_order), key=_heading):
        by_command = [list(processes) for _, processes in groupby(group, key=lambda report: report.command)]
        members = [pool(processes) for processes in by_command]
        parts = [f"### {heading}", _agreement(by_command, members)]
        for padded in (False, True):
            if rows := [report for report in members if (report.base.flops_unpacked is not None) == padded]:
                parts.append(_table(rows, padded))
        parts.append("\n".join(["```sh", *(_as_typed_today(report.command) for report in members), "```"]))
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def _as_typed_today(command: str) -> str:
    return " ".join(RENAMED.get(word, word) for word in command.split(" "))


def pool(processes: Sequence[BenchmarkReport]) -> BenchmarkReport:
    """One report with the samples of all processes that ran one command.

    Raises:
        ValueError: they do not agree on the FLOPs of a candidate, so they measured different things.
    """
    first = processes[0]
    plugins = [_pool(list(same)) for same in zip(*(report.plugins for report in processes), strict=True)]
    return replace(first, base=_pool([report.base for report in processes]), plugins=plugins)


def _pool(same: list[Measurement]) -> Measurement:
    if len({(one.name, one.flops, one.flops_unpacked) for one in same}) > 1:
        raise ValueError(f"Processes of one command disagree: {[(one.name, one.flops) for one in same]}.")
    return replace(
        same[0],
        peak_memory=max(one.peak_memory for one in same),
        seconds=[value for one in same for value in one.seconds],
    )


def _agreement(by_command: list[list[BenchmarkReport]], pooled: list[BenchmarkReport]) -> str:
    """A sentence on how far the processes of a row are apart."""
    counts = sorted({len(processes) for processes in by_command})
    apart = max(
        abs(report.speedup(plugin).median / whole.speedup(shown).median - 1)
        for processes, whole in zip(by_command, pooled, strict=True)
        for report in processes
        for plugin, shown in zip(report.plugins, whole.plugins, strict=True)
    )
    numbers = " or ".join(map(str, counts))
    return f"Processes a row: {numbers}. What a single one measured lies at most {apart:.0%} from its row's speed-up."


def _heading(report: BenchmarkReport) -> str:
    environment = report.environment
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "peft"))
    return f"{report.machine}, {report.settings['dtype']} ({versions})"


def _order(report: BenchmarkReport) -> tuple[str, str, int, int, str]:
    settings = report.settings
    return _heading(report), report.model, settings["batch"], settings["length"] or 0, report.command


def _table(reports: list[BenchmarkReport], padded: bool) -> str:
    header = [*COLUMNS, *(PADDED_COLUMNS if padded else []), *COST_COLUMNS]
    rows = [_row(report, plugin) for report in reports for plugin in report.plugins]
    return make_table(header, rows, text_columns=2)


def _row(report: BenchmarkReport, plugin: Measurement) -> list[str]:
    batch, length = report.settings["batch"], report.settings["length"]
    measured, ideal, unpacked = report.speedup(plugin), report.ideal_speedup(plugin), report.unpacked_speedup(plugin)
    cells = [report.model, f"{batch} images" if length is None else f"{batch}×{length}"]
    cells += [plugin.name.removeprefix("k = "), f"{report.flops_saved(plugin):.1%}", f"{ideal:.2f}×"]
    cells += [_spread(measured, "×"), f"{measured.median / ideal:.2f}"]
    if unpacked is not None:
        cells += [f"{unpacked:.2f}×", f"{measured.median / unpacked:.2f}"]
    milliseconds = [Spread.of([1000 * value for value in each.seconds]) for each in (report.base, plugin)]
    memory = [decimal(each.peak_memory) for each in (report.base, plugin)]
    return [*cells, *map(_spread, milliseconds), *memory, f"{report.added_parameters:,}"]


def _spread(spread: Spread, unit: str = "") -> str:
    digits = 2 if spread.median < 100 else 0
    return f"{spread.median:.{digits}f}{unit} [{spread.low:.{digits}f}–{spread.high:.{digits}f}]"


def main(
    results: Annotated[Path, typer.Option(help="Folder of the reports.")] = HERE / "results",
    page: Annotated[Path, typer.Option(help="The page with the markers.")] = HERE.parent / "docs" / "benchmark.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is out of date.")] = False,
) -> None:
    """Write the tables of the page from the reports."""
    old = page.read_text(encoding="utf-8")
    reports = [BenchmarkReport.load(path) for path in sorted(results.glob("*.json"))]
    new = replace_between(old, "results", render(reports))
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "parts").glob("*.json"))]
    new = replace_between(new, "parts", parts_table(parts))
    if check and new != old:
        typer.echo(f"{page} is out of date. Run: python benchmarks/render.py", err=True)
        raise typer.Exit(1)
    if not check:
        write_text(page, new)


if __name__ == "__main__":
    typer.run(main)
