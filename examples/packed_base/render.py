"""Render the results as tables into docs/packed_bases.md.

python examples/packed_base/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from peft_variator.files import write_text
from peft_variator.markdown import make_table, replace_between


HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "packed_bases.md"
RESULTS = HERE / "results"
Record = dict[str, Any]
# heading, figure, how many of its units make one shown
INFERENCE = (
    ("first load, s", "load_seconds", 1.0),
    ("load of an unchanged file, s", "unchanged_load_seconds", 1.0),
    ("first load and read, s", "read_seconds", 1.0),
    ("the same from disk, s", "cold_read_seconds", 1.0),
    ("memory while loading, MB", "load_resident", 1e6),
    ("prefill, s", "prefill_seconds", 1.0),
    ("one token, ms", "token_seconds", 1e-3),
    ("memory of the prefill, MB", "prefill_resident", 1e6),
)
TRAINING = (("step, s", "step_seconds", 1.0), ("memory of the step, MB", "step_resident", 1e6))


def _machine(facts: Record) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("peft-variator", "peft", "transformers", "torch"))
    return (
        f"{facts['cpu']}, {facts['threads']} thread(s) on {facts['cores']} cores, load average "
        f"{facts.get('load_average', 'unknown')}, {facts['date']}; Python {facts['python']}, {versions}."
    )


def end_to_end(report: Record) -> str:
    """A row a stage."""
    rows = []
    for stage in report["stages"]:
        size = "" if stage["bytes"] is None else f"{stage['bytes'] / 1e6:.1f}"
        difference = "" if stage["difference"] is None else f"{stage['difference']:.2g}"
        rows.append([stage["stage"], f"{stage['spearman']:.4f}", difference, size])
    seconds = sum(report["cpu_seconds"].values())
    facts = (
        f"`{report['command']}`: {report['packed_layers']} packed layers, {report['trained_parameters']:,} trained "
        f"parameters, {report['steps']} steps, {seconds:.0f} CPU seconds. {_machine(report['environment'])}"
    )
    return f"{make_table(['', 'STS-B', 'embeddings differ by', 'files, MB'], rows)}\n\n{facts}"


def _cell(figure: Record | None, unit: float) -> str:
    """Median, quartiles, and how many times the reference's; nothing for what a row does not measure."""
    if figure is None:
        return ""
    low, median, high = (figure["quartiles"][name] / unit for name in ("low", "median", "high"))
    digits = 0 if median >= 100 else 2
    times = "" if figure["times_dense"] is None else f", {figure['times_dense']['median']:.2f}×"
    return f"{median:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]{times}"


def _figures(rows: Record, columns: tuple[tuple[str, str, float], ...]) -> str:
    chosen = {name: row for name, row in rows.items() if columns[0][1] in row}
    if not chosen:
        return ""
    columns = tuple(column for column in columns if any(column[1] in row for row in chosen.values()))
    body = [[name, *(_cell(row.get(figure), unit) for _, figure, unit in columns)] for name, row in chosen.items()]
    return make_table(["", *(heading for heading, _, _ in columns)], body)


def bench(report: Record, training: Record | None = None) -> str:
    """Two tables of a model: loading and running, and training, of a run of its own where this one has none."""
    files, rows = report["file_bytes"], report["rows"]
    packed, dense = files["packed-bfloat16"], files["dense-bfloat16"]
    peak = rows["packed bfloat16"]["load_resident"]["quartiles"]["median"]
    parts = [
        f"### {report['model']}, 1×{report['settings']['length']}",
        _figures(rows, INFERENCE),
        _figures(rows, TRAINING),
        f"Files: {dense / 1e6:.0f} MB dense in bfloat16, {packed / 1e6:.0f} MB packed ({packed / dense:.3f}). "
        f"Loading the packed one held {peak / packed:.2f}× its files at the peak.",
        _run(report),
    ]
    if training is not None and not parts[2]:
        parts += [
            f"Training, 1×{training['settings']['length']}:",
            _figures(training["rows"], TRAINING),
            _run(training),
        ]
    return "\n\n".join(filter(None, parts))


def _run(report: Record) -> str:
    settings = report["settings"]
    return (
        f"`{report['command']}`: {settings['rounds']} processes a row, {settings['samples']} samples in each, rank "
        f"{settings['rank']}. {_machine(report['environment'])}"
    )


def few_tokens(report: Record) -> str:
    """A row a shape and dtype, a column a number of tokens: how many times as fast as dense, packed and unpacked."""
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for row in report["rows"]:
        shape = "×".join(map(str, row["shape"]))
        unpacked = row["dense"] / row["unpacked in each call"]
        figures = f"{row['packed, times faster']:.2f} ({unpacked:.2f})"
        rows.setdefault((shape, row["dtype"]), {})[row["tokens"]] = figures
    tokens = list(next(iter(rows.values())))
    table = make_table(
        ["out × in", "dtype", *(f"{count} token{'s' * (count > 1)}" for count in tokens)],
        [[*key, *(cells[count] for count in tokens)] for key, cells in rows.items()],
        text_columns=2,
    )
    facts = f"`{report['command']}`, {report['instructions']}. {_machine(report['environment'])}"
    return f"{table}\n\n{facts}"


def _reports(folder: Path, name: str) -> list[Record]:
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob(f"{name}*.json"), reverse=True)]


def main(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Write the tables of what has been run."""
    text = page.read_text("utf-8")
    for name, render in (("end-to-end", end_to_end), ("few-tokens", few_tokens)):
        reports = _reports(results, name)
        if reports:
            text = replace_between(text, name, "\n\n".join(map(render, reports)))
    training = {report["model"]: report for report in _reports(results / "training", "bench")}
    parts = [bench(report, training.get(report["model"])) for report in _reports(results, "bench")]
    if parts:
        text = replace_between(text, "bench", "\n\n".join(parts))
    write_text(page, text)


if __name__ == "__main__":
    typer.run(main)
