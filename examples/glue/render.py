"""Render the results as tables and a plot into the documentation.

python examples/glue/render.py
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_variator.files import replacing, write_text
from peft_variator.markdown import make_table, replace_between


HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
RATIOS = (2, 4, 8)
SHIPPED_RATIOS = (4, 8, 16)
Run = dict[str, Any]


def _load(folder: Path, pattern: str) -> list[Run]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(pattern))]


def _row(run: Run, ratio: int) -> dict[str, float]:
    return next(row for row in run["rows"] if row["ratio"] == ratio)


def _saved(run: Run, ratio: int) -> float:
    return 100 * (1 - _row(run, ratio)["flops"] / _row(run, 1)["flops"])


def _drop(run: Run, ratio: int) -> float:
    return _row(run, 1)["score"] - _row(run, ratio)["score"]


def _with_spread(values: list[float], digits: int = 2) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _by_task(runs: list[Run]) -> dict[str, list[Run]]:
    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_task[run["task"]].append(run)
    return by_task


def _mean_drops(by_task: dict[str, list[Run]], ratios: tuple[int, ...]) -> list[str]:
    drops = [[statistics.fmean(_drop(run, ratio) for run in group) for group in by_task.values()] for ratio in ratios]
    return [f"**{statistics.fmean(each):+.2f}**" for each in drops]


def main_table(runs: list[Run], speeds: dict[str, dict[int, dict[str, float]]]) -> str:
    """Score of the base and loss of points, FLOPs saved and speed-up at each ratio, a row a task."""
    by_task = _by_task(runs)
    rows = [_task_row(name, group, speeds.get(name, {})) for name, group in by_task.items()]
    mean = ["**mean**", "", "", *_mean_drops(by_task, RATIOS), "", "", ""]
    head = ["task", "metric", "base", *(f"lost at k = {ratio}" for ratio in RATIOS)]
    head += ["FLOPs saved at 2 / 4 / 8", "speed-up at 2 / 4 / 8", "seeds"]
    return make_table(head, [*rows, mean])


def unlabelled_table(runs: list[Run], ratios: tuple[int, ...]) -> str:
    """Base, loss of points and FLOPs saved of the plugins that were adapted without labels, a row a task."""
    by_task = _by_task(runs)
    rows = [
        [
            name,
            f"{_row(group[0], 1)['score']:.2f}",
            *(_with_spread([_drop(run, ratio) for run in group]) for ratio in ratios),
            _all_saved(group[0], ratios),
            str(len(group)),
        ]
        for name, group in by_task.items()
    ]
    head = [
        "task",
        "base",
        *(f"lost at k = {ratio}" for ratio in ratios),
        "FLOPs saved at " + " / ".join(map(str, ratios)),
        "seeds",
    ]
    return make_table(head, [*rows, ["**mean**", "", *_mean_drops(by_task, ratios), "", ""]])


def _all_saved(run: Run, ratios: tuple[int, ...]) -> str:
    return " / ".join(f"{_saved(run, ratio):.0f} %" for ratio in ratios)


def _task_row(name: str, runs: list[Run], speed: dict[int, dict[str, float]]) -> list[str]:
    saved = _all_saved(runs[0], RATIOS)
    faster = " / ".join(f"{speed[ratio]['median']:.2f}×" for ratio in RATIOS) if speed else "not measured"
    lost = [_with_spread([_drop(run, ratio) for run in runs]) for ratio in RATIOS]
    base = f"{_row(runs[0], 1)['score']:.2f}"
    return [name, runs[0]["metric"], base, *lost, saved, faster, str(len(runs))]


def speed_note(timed: list[Run]) -> str:
    """What the speed-ups were measured with, and how far their quartiles lie from the medians; nothing without any."""
    if not timed:
        return ""
    spreads = [spread for run in timed for spread in run["speedup"].values()]
    widest = max(max(s["high"] - s["median"], s["median"] - s["low"]) / s["median"] for s in spreads)
    facts = timed[0]["environment"]
    in_use = max(run["environment"]["cpu_in_use"] for run in timed)
    return (
        f"Speed-ups: `{timed[0]['command']}`. {facts['cpu']}, {facts['threads']} threads on {facts['cores']} cores, "
        f"of which other programs used at most {in_use:.0%} before a task; torch {facts['torch']}, {facts['date']}. "
        f"Quartiles lie within {widest:.0%} of the medians."
    )


def ablation_table(runs: list[Run]) -> str:
    """Points lost by every variant on the tasks on which all of them were run, seed 0."""
    seed_zero = [run for run in runs if run["seed"] == 0]
    variants = list(dict.fromkeys(run["variant"] for run in seed_zero))
    tasks = [
        task
        for task in dict.fromkeys(run["task"] for run in seed_zero)
        if {run["variant"] for run in seed_zero if run["task"] == task} == set(variants)
    ]
    found = {(run["variant"], run["task"]): run for run in seed_zero}
    head = ["variant", *(f"{task}, k = {ratio}" for task in tasks for ratio in RATIOS)]
    rows = [
        [variant, *(_ablation_cell(found[variant, task], ratio) for task in tasks for ratio in RATIOS)]
        for variant in sorted(variants, key=lambda name: (name != "main", name))
    ]
    return make_table(head, rows)


def _ablation_cell(run: Run, ratio: int) -> str:
    return f"{_drop(run, ratio):+.2f}" if any(row["ratio"] == ratio for row in run["rows"]) else "–"


def plot(labelled: list[Run], unlabelled: list[Run], path: Path) -> None:
    """Points lost against FLOPs saved, a line a task; plugins adapted with the task's labels beside those without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 5), layout="constrained", sharex=True)
    panels_of = {"without labels: it follows the task model alone": unlabelled, "with the labels, too": labelled}
    colours = {name: f"C{number}" for number, name in enumerate(_by_task(labelled))}
    for axes, (title, runs) in zip(panels, panels_of.items(), strict=True):
        for name, group in _by_task(runs).items():
            lost = [[_drop(run, ratio) for run in group] for ratio in RATIOS]
            means = [statistics.fmean(each) for each in lost]
            spread = [statistics.stdev(each) for each in lost] if len(group) > 1 else None
            saved = [_saved(group[0], ratio) for ratio in RATIOS]
            label = f"{name} ({len(group)} seeds)" if spread else name
            axes.errorbar(saved, means, yerr=spread, marker="o", capsize=2, color=colours[name], label=label)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xlabel("FLOPs saved, % (right is better; k = 2, 4, 8 from the left)")
        axes.set_title(f"Adapted {title}", fontsize="medium")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("points lost against the base\n(down is better; below 0: better than the base)")
    figure.suptitle(
        "all-MiniLM-L6-v2 on tasks of GLUE and SQuAD, with one plugin at k = 2, 4 and 8\n"
        "one seed, or several with bars of their standard deviation; the panels have scales of their own",
        fontsize="large",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = HERE / "results",
    page: Annotated[Path, typer.Option(help="The page to fill in.")] = DOCS / "glue.md",
) -> None:
    """Fill in the page."""
    runs = _load(results, "*-seed*.json")
    main_runs = [run for run in runs if run["variant"] == "main"]
    if not main_runs:
        raise typer.BadParameter(f"{results} holds no results; run examples/glue/run.py first.")
    timed = _load(results, "*-speed.json")
    speeds = {run["task"]: {int(ratio): spread for ratio, spread in run["speedup"].items()} for run in timed}
    text = page.read_text(encoding="utf-8")
    text = replace_between(text, "results", f"{main_table(main_runs, speeds)}\n\n{speed_note(timed)}".rstrip())
    unlabelled = [run for run in runs if run["variant"] == "no-task-loss"]
    text = replace_between(text, "unlabelled", unlabelled_table(unlabelled, RATIOS))
    shipped = [run for run in runs if run["variant"] == "neurons"]
    if shipped:
        text = replace_between(text, "neurons", unlabelled_table(shipped, SHIPPED_RATIOS))
        runs = [run for run in runs if run["variant"] != "neurons"]  # other ratios, another stage one
    text = replace_between(text, "ablation", ablation_table(runs))
    write_text(page, text)
    plot(main_runs, unlabelled, DOCS / "images" / "glue.png")
    print(f"Wrote {page} and {DOCS / 'images' / 'glue.png'}")


if __name__ == "__main__":
    typer.run(main)
