"""Render what has been run as tables and two plots into the documentation.

python examples/vlm_restore/render.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import typer
from plan import CONTROL, METHODS, RESTORATIONS, SPLITS, plan

from peft_variator.files import replacing, write_text
from peft_variator.markdown import make_table, replace_between


HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
Record = dict[str, Any]
LABELS = dict(zip(RESTORATIONS, ("pruned", "LoRA merged", "SparseLoRA", "SparseLoRA + KL"), strict=True))


def _percent(values: list[float]) -> str:
    """Mean and standard deviation, in percent; "–" for a run that was not made."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f} ({len(values)} seeds)" if len(values) > 1 else mean


def _setting(record: Record) -> str:
    if record["method"] == CONTROL:
        return "nothing (control)"
    return f"{record['method']}, " + ", ".join(f"{tower} {amount}" for tower, amount in record["amounts"].items())


def _won_back(values: list[float], pruned: list[float], dense: float) -> str:
    """Share of what pruning lost, from means over the seeds; nothing where it lost less than a point."""
    lost = dense - statistics.fmean(pruned) if pruned else 0.0
    return f", {(statistics.fmean(values) - dense + lost) / lost:.0%}" if values and lost >= 0.01 else ""


def study_table(records: list[Record], dense: float) -> str:
    """A row a way of pruning: accuracy without and with each restoration, and the zeros that LoRA leaves."""
    settings = list(dict.fromkeys(_setting(record) for record in records))
    rows = []
    for setting in settings:
        chosen = [record for record in records if _setting(record) == setting]
        by_how = {how: [each for each in chosen if each["restoration"] == how] for how in RESTORATIONS}
        accuracies = {how: [each["accuracy"] for each in by_how[how]] for how in RESTORATIONS}
        pruned = accuracies["none"]
        cells = [_percent(pruned)]
        cells += [_percent(accuracies[how]) + _won_back(accuracies[how], pruned, dense) for how in RESTORATIONS[1:]]
        zeros = _percent([each["sparsity"] for each in by_how["lora"]])
        back = _percent([each["accuracy_with_zeros_put_back"] for each in by_how["lora"]])
        rows.append([setting, *cells, zeros, back])
    return make_table(["pruned by, to", *LABELS.values(), "zeros left by LoRA", "LoRA, zeros put back"], rows)


def _mark_base(axes: Any, base: Record) -> None:
    axes.axhline(100 * base["accuracy"], color="gray", linestyle="--", label="not pruned")


def allocation_plot(records: list[Record], base: Record, path: Path) -> None:
    """Accuracy over how the sparsity is split between vision and language."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for how in ("none", "sparse-lora-distilled"):
        points = [
            (vision, record["accuracy"])
            for vision, language in SPLITS
            for record in records
            if record["amounts"] == {"vision": str(vision), "language": str(language)} and record["restoration"] == how
        ]
        axes.plot([100 * x for x, _ in points], [100 * y for _, y in points], marker="o", label=LABELS[how])
    _mark_base(axes, base)
    axes.set(
        xlabel="zeros in the vision tower, %; those in the language model make it 100",
        ylabel="accuracy on easy-VQA, % (up is better)",
    )
    axes.set_title(
        "A small LLaVA, pruned by Wanda without a pattern:\nhow much in which tower (one seed)", fontsize="medium"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def recovery_plot(records: list[Record], base: Record, path: Path) -> None:
    """Accuracy at 2:4 in both towers by pruning method, a point a restoration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    both = [record for record in records if record["amounts"] == {"vision": "2:4", "language": "2:4"}]
    methods = [method for method in METHODS if any(record["method"] == method for record in both)]
    for place, how in enumerate(RESTORATIONS):
        chosen = {
            index: [each["accuracy"] for each in both if each["method"] == method and each["restoration"] == how]
            for index, method in enumerate(methods)
        }
        points = [(index + 0.2 * place, [100 * each for each in values]) for index, values in chosen.items() if values]
        axes.errorbar(
            [x for x, _ in points],
            [statistics.fmean(values) for _, values in points],
            yerr=[statistics.stdev(values) if len(values) > 1 else 0 for _, values in points],
            fmt="o",
            capsize=3,
            label=LABELS[how],
            zorder=2,
        )
    _mark_base(axes, base)
    axes.grid(axis="y", alpha=0.4)
    seeds = {method: len({each["seed"] for each in both if each["method"] == method}) for method in methods}
    names = [f"{method}\n({count} seeds)" if count > 1 else f"{method}\n(one seed)" for method, count in seeds.items()]
    axes.set_xticks([index + 0.3 for index in range(len(methods))], names)
    axes.set(xlabel="pruned by", ylabel="accuracy on easy-VQA, % (up is better)")
    axes.set_title(
        "A small LLaVA, pruned 2:4 in both towers and restored\n(bars: standard deviation over seeds)",
        fontsize="medium",
    )
    axes.legend(loc="center right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def plugin_table(records: list[Record]) -> str:
    """A row a plugin and ratio: accuracy, the FLOPs of a question that it saves, and times as fast if it was timed."""
    sizes = list(dict.fromkeys(size for each in records if "speed" in each for size in each["speed"]["batches"]))
    rows = []
    for record in records:
        base = record["rows"][0]
        rows.append([record["merges"], "1", _percent([base["accuracy"]]), "0", *["1"] * len(sizes)])
        for row in record["rows"][1:]:
            times = [
                record["speed"]["batches"][size][str(row["ratio"])] if "speed" in record else None for size in sizes
            ]
            cells = [f"{each['median']:.2f} [{each['low']:.2f}–{each['high']:.2f}]" if each else "–" for each in times]
            saved = f"{1 - row['flops'] / base['flops']:.0%}"
            rows.append([record["merges"], str(row["ratio"]), _percent([row["accuracy"]]), saved, *cells])
    titles = [f"times as fast, batch {size}" for size in sizes]
    return make_table(["merged", "k", "accuracy", "FLOPs saved", *titles], rows)


def plugin_text(records: list[Record]) -> str:
    """The table, and what it was measured on."""
    first = records[0]
    parameters, environment = first["parameters"], first["environment"]
    counts = [each["parameters"]["plugin"] for each in records]
    said = (
        f"{first['steps']} steps of a plugin, {first['questions']:,} test questions. Beside the base's "
        f"{parameters['base']:,} parameters a plugin has {min(counts):,} to {max(counts):,}. "
        f"{environment['cpu']}, torch {environment['torch']}, {environment['date']}."
    )
    timed = next((each["speed"]["environment"] for each in records if "speed" in each), None)
    times = f" Times: median and quartiles, float32, {timed['threads']} thread(s), {timed['cpu']}." if timed else ""
    return f"{plugin_table(records)}\n\n{said}{times}"


def plugin_plot(records: list[Record], path: Path) -> None:
    """Accuracy over the FLOPs saved, a line a plugin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for record in records:
        base = record["rows"][0]["flops"]
        points = [(100 * (1 - row["flops"] / base), 100 * row["accuracy"], row["ratio"]) for row in record["rows"]]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=record["merges"])
        for x, y, ratio in points[1:]:
            axes.annotate(f"{ratio}", (x, y), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
    axes.set(xlabel="FLOPs of a question saved, %", ylabel="accuracy on easy-VQA, % (up is better)")
    axes.set_title("Plugins in a small LLaVA, by what they merge\n(numbers: k; one seed)", fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def main() -> None:
    """Write what there is between the markers of the page."""
    base_file = HERE / "results" / "base.json"
    files = [HERE / "results" / f"study-{run.name}.json" for run in plan()]  # in the order of the plan
    records = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
    if not base_file.is_file() or not records:
        raise typer.BadParameter(f"{HERE / 'results'} holds no base.json or no study-*.json: nothing to render.")
    base = json.loads(base_file.read_text("utf-8"))
    environment = base["environment"]
    parts = [
        f"Base: {base['parameters']:,} parameters, {100 * base['accuracy']:.2f} % of the test questions after "
        f"{' + '.join(f'{steps:,}' for steps in base['steps'].values())} steps ({', '.join(base['steps'])}; "
        f"{base['cpu_minutes']:.1f} CPU minutes).",
        study_table(records, base["accuracy"]),
        f"{environment['cpu']}, {environment['threads']} thread(s), torch {environment['torch']}, transformers "
        f"{environment['transformers']}, peft {environment['peft']}, {environment['date']}.",
    ]
    page = replace_between((DOCS / "vlm_restore.md").read_text("utf-8"), "results", "\n\n".join(parts))
    plugins = [json.loads(file.read_text("utf-8")) for file in (HERE / "results").glob("plugin-*.json")]
    plugins.sort(key=lambda record: (record["zeros"] > 0.1, -record["rows"][-1]["flops"]))  # least saved first
    if plugins:
        page = replace_between(page, "plugins", plugin_text(plugins))
        plugin_plot(plugins, DOCS / "images" / "vlm_plugins.png")
    write_text(DOCS / "vlm_restore.md", page)
    splits = [{"vision": str(vision), "language": str(language)} for vision, language in SPLITS]
    if any(record["amounts"] in splits for record in records):
        allocation_plot(records, base, DOCS / "images" / "vlm_allocation.png")
    recovery_plot(records, base, DOCS / "images" / "vlm_recovery.png")


if __name__ == "__main__":
    typer.run(main)
