"""Render the results as tables into docs/restore.md.

python examples/restore/render.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import typer

from peft_variator.files import write_text
from peft_variator.markdown import make_table, replace_between


HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "restore.md"
Record = dict[str, Any]
# Figures of texts besides the first, with the heads of their columns.
OTHER_TEXTS = {"loss_tinystories": "loss on TinyStories"}
TITLES = {
    "dense": "dense",
    "pruned": "pruned",
    "lora": "plain LoRA, merged",
    "sparse-lora": "SparseLoRA, merged",
    "sparse-lora-distilled": "SparseLoRA following the dense model, merged",
}


def _spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _won_back(records: list[Record], chosen: list[Record], quality: str) -> str:
    """Share of what pruning lost that a variant won back, from means over the seeds."""
    means = {
        variant: statistics.fmean(record[quality] for record in records if record["variant"] == variant)
        for variant in ("dense", "pruned")
        if any(record["variant"] == variant for record in records)
    }
    if len(means) < 2 or chosen[0]["variant"] in means:
        return ""
    mean = statistics.fmean(record[quality] for record in chosen)
    return f"{(mean - means['pruned']) / (means['dense'] - means['pruned']):.0%}"


def table(records: list[Record], quality: str, digits: int) -> str:
    """A row a variant; `records` are of one way of pruning."""
    rows, others = [], [name for name in OTHER_TEXTS if any(name in record for record in records)]
    for variant, title in TITLES.items():
        chosen = [record for record in records if record["variant"] == variant]
        if not chosen:
            continue
        met = {True: "yes", False: "no", None: ""}[chosen[0]["pattern_met"]]
        cells = [_spread([record[quality] for record in chosen], digits), _won_back(records, chosen, quality)]
        cells += [_spread([record[name] for record in chosen], digits) for name in others]
        rows.append([title, *cells, f"{chosen[0]['sparsity']:.1%}", met, str(len(chosen))])
        if "loss_with_zeros_put_back" in chosen[0]:
            back = _spread([record["loss_with_zeros_put_back"] for record in chosen], digits)
            cells = [_spread([record[f"{name}_with_zeros_put_back"] for record in chosen], digits) for name in others]
            rows.append(["… with the zeros put back", back, "", *cells, "50.0%", "yes", str(len(chosen))])
    return make_table(["", quality, "won back", *map(OTHER_TEXTS.get, others), "zeros", "pattern", "seeds"], rows)


def delivered(record: Record) -> str:
    """What came of the model that was packed, merged by file and loaded."""
    packed = record["packed"]
    sizes = " to ".join(f"{packed['bytes'][name] / 1e6:.0f}" for name in ("pruned", "merged"))
    return (
        f"{TITLES[record['variant']]}, seed {record['seed']}: packed, merged by file and loaded again, {sizes} MB; "
        "its logits differ from those of the model merged in memory by at most "
        f"{packed['largest_difference_of_logits']:.1e}. Greedy continuation: “{' '.join(packed['generated'].split())}”"
    )


def conditions(records: list[Record]) -> str:
    """Where the records of a subject come from: each machine, its versions, dates and loads."""
    lines: dict[str, list[Record]] = {}
    for record in records:
        facts = record["environment"]
        versions = ", ".join(f"{name} {facts[name]}" for name in ("peft-variator", "peft", "transformers", "torch"))
        line = f"{facts['cpu']}, {facts['threads']} thread(s), {facts['date']}; Python {facts['python']}, {versions}"
        lines.setdefault(line, []).append(record)
    return " ".join(
        f"{line}; load {min(loads)}–{max(loads)}, {sum(record['cpu_seconds'] for record in chosen):.0f} CPU seconds."
        for line, chosen in lines.items()
        for loads in [[record["environment"]["load_average"] for record in chosen]]
    )


def main() -> None:
    """Write what there is between the markers of the page."""
    records = [json.loads(file.read_text("utf-8")) for file in sorted((HERE / "results").glob("*.json"))]
    if not records:
        raise typer.BadParameter(f"{HERE / 'results'} holds no results. Run examples/restore/run.py first.")
    parts = []
    for subject, quality, digits in (("language", "loss", 4), ("smollm2", "loss", 4), ("encoder", "score", 2)):
        for setting in dict.fromkeys(record["setting"] for record in records if record["subject"] == subject):
            chosen = [each for each in records if each["subject"] == subject and each["setting"] == setting]
            steps = next((record["steps"] for record in chosen if "steps" in record), None)
            title = f"### {subject}, {setting}" + (f", {steps} steps" if steps else "")
            parts += [title, table(chosen, quality, digits)]
            parts += [delivered(record) for record in chosen if "packed" in record]
        parts.append(conditions([record for record in records if record["subject"] == subject]))
    write_text(PAGE, replace_between(PAGE.read_text("utf-8"), "results", "\n\n".join(filter(None, parts))))


if __name__ == "__main__":
    typer.run(main)
