"""Write the tables of docs/benchmark.md from the reports in benchmarks/results/.

python benchmarks/render.py           # writes docs/benchmark.md
python benchmarks/render.py --check   # only says, by its exit status, whether the page is up to date
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from peft_variator.files import write_text
from peft_variator.profiling import BenchmarkReport, Measurement, Spread


__all__ = ["main", "render", "replace_between_markers"]

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: begin (written by benchmarks/render.py) -->", "<!-- results: end -->"
COLUMNS = ["model", "input", "k", "FLOPs saved", "ideal", "measured", "measured / ideal"]
PADDED_COLUMNS = ["ideal, pads computed", "measured / that"]
COST_COLUMNS = ["base, ms", "with plugin, ms", "peak memory", "with plugin", "added parameters"]


def render(reports: list[BenchmarkReport]) -> str:
    """Markdown: one section a machine and dtype, one table for full and one for padded batches, then the commands."""
    if not reports:
        return "No results are committed yet.\n"
    sections = []
    for heading, group in groupby(sorted(reports, key=_order), key=_heading):
        members = list(group)
        parts = [f"### {heading}"]
        for padded in (False, True):
            if rows := [report for report in members if (report.base.flops_unpacked is not None) == padded]:
                parts.append(_table(rows, padded))
        parts.append("\n".join(["```sh", *(report.command for report in members), "```"]))
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections) + "\n"


def replace_between_markers(page: str, content: str) -> str:
    """`page` with `content` between its two marker lines.

    Raises:
        ValueError: the page does not have each marker once, in their order.
    """
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed) or page.count(BEGIN) + page.count(END) != 2:
        raise ValueError(f"The page must have the lines {BEGIN!r} and {END!r} once each, in this order.")
    return f"{before}{BEGIN}\n\n{content}\n{END}{after}"


def _heading(report: BenchmarkReport) -> str:
    environment = report.environment
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "peft"))
    return f"{report.machine}, {report.settings['dtype']} ({versions})"


def _order(report: BenchmarkReport) -> tuple[str, str, int, int]:
    return _heading(report), report.model, report.settings["batch"], report.settings["length"] or 0


def _table(reports: list[BenchmarkReport], padded: bool) -> str:
    header = [*COLUMNS, *(PADDED_COLUMNS if padded else []), *COST_COLUMNS]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    lines += [_row(report, plugin) for report in reports for plugin in report.plugins]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    new = replace_between_markers(old, render([BenchmarkReport.load(path) for path in sorted(results.glob("*.json"))]))
    if check and new != old:
        typer.echo(f"{page} is out of date. Run: python benchmarks/render.py", err=True)
        raise typer.Exit(1)
    if not check:
        write_text(page, new)


if __name__ == "__main__":
    typer.run(main)
