"""What plugins of real models lose, and how much faster they are: tables and a picture a model, of `results/*.json`.

python examples/real_models/frontier.py
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights import WEIGHTS

from peft_variator.files import write_text
from peft_variator.markdown import make_table, replace_between


__all__ = [
    "in_int8",
    "measured_values",
    "model_of",
    "quality_table",
    "seeds_table",
    "shipped_table",
    "speed_table",
    "told_of_changes",
    "write_page",
    "write_readme",
]

RESULTS = Path(__file__).parent / "results"
PLUGINS = Path(__file__).parents[1] / "plugins"
DOCS = Path(__file__).parents[2] / "docs"
# Folders of results that were timed on other processors, and what these are.
ELSEWHERE = {"avx2": "On a processor with AVX2 and without AVX-512"}
QUIET = 0.1  # share of the processors that others may use without a word


@dataclass(frozen=True)
class Figure:
    """A figure of a part of a measurement.

    Args:
        part: name of the part.
        key: name of the figure in it.
        title: what it is called in a table.
        digits: after the point.
        more_is_better: which way is better.
    """

    part: str
    key: str
    title: str
    digits: int = 2
    more_is_better: bool = True


# A kind of model has one figure at least; the first that was measured is drawn.
FIGURES: dict[str, tuple[Figure, ...]] = {
    "text": (
        Figure("stsb", "spearman", "STS-B test, Spearman × 100"),
        Figure("sst2", "accuracy", "SST-2, linear probe, %"),
        Figure("mrpc", "accuracy", "MRPC, linear probe, %"),
        Figure("qqp", "accuracy", "QQP, linear probe, %"),
        Figure("squad", "first", "SQuAD, own paragraph first, %"),
    ),
    "causal": (
        Figure("wikitext2-256", "nll", "WikiText-2, NLL after 256 tokens", 3, False),
        Figure("wikitext2-256", "kl", "KL from the base there", 3, False),
        Figure("wikitext2-1024", "nll", "WikiText-2, NLL after 1024 tokens", 3, False),
        Figure("squad", "f1", "SQuAD answers, F1"),
        Figure("squad", "agreement", "greedy agreement, %"),
    ),
    "vision": (
        Figure("cifar10", "accuracy", "CIFAR-10, linear probe, %"),
        Figure("photographs", "class_cosine", "photographs, cosine of class tokens", 4),
        Figure("photographs", "patch_cosine", "photographs, cosine of patches", 4),
    ),
    "audio": (
        Figure("digits", "wer", "spoken digits, word errors, %", 2, False),
        Figure("digits", "wer_to_base", "spoken digits, word errors against the base's transcript, %", 2, False),
        Figure("sentences", "wer", "read sentences, word errors, %", 2, False),
        Figure("sentences", "wer_to_base", "read sentences, word errors against the base's transcript, %", 2, False),
    ),
}
SHOWN_RATIO = {
    "all-MiniLM-L6-v2": 32,
    "all-mpnet-base-v2": 16,
    "SmolLM2-135M-Instruct": 8,
    "dinov2-vit-s14": 4,
    "whisper-tiny.en": 3,
}
"""Of the plugins that are shipped, the ratio that the README's table has: one that their loss allows."""
SHOWN_FIGURES = {
    "text": ("stsb", "squad"),
    "causal": ("wikitext2-256", "squad"),
    "vision": ("cifar10",),
    "audio": ("digits",),
}
"""The parts of a measurement that the README's table has."""
MAIN_SHAPE = {"all-mpnet-base-v2": (8, 128), "dinov2-vit-s14": (8, 0)}
"""The shape that is drawn where the first of a record isn't the one that people ask for."""


def model_of(plugin: str) -> str | None:
    """The model that a plugin's folder is for: its name, or its name and what tells a further width from the first.

    Args:
        plugin: name of the folder, as `all-MiniLM-L6-v2` or `all-MiniLM-L6-v2-n256`.

    Returns:
        A key of `WEIGHTS`; `None` if it is for none of them.
    """
    models = [model for model in WEIGHTS if plugin == model or plugin.startswith(f"{model}-")]
    return max(models, key=len, default=None)


def figures_of(plugin: str) -> tuple[Figure, ...]:
    """What is measured of a plugin's model.

    Raises:
        ValueError: the plugin is for none of the models.
    """
    model = model_of(plugin)
    if model is None:
        raise ValueError(f"{plugin!r} starts with the name of no model. Choose from {', '.join(WEIGHTS)}.")
    return FIGURES[WEIGHTS[model].kind]


def _measured(name: str, ratios: list[int], results: Path) -> dict[str, dict[str, Any]]:
    """Title of a column → the parts that were measured."""
    files = {"base": results / f"base-{model_of(name)}.json"}
    files |= {f"k = {k}": results / f"plugin-{name}-k{k}.json" for k in ratios}
    return {title: json.loads(file.read_text())["parts"] for title, file in files.items() if file.is_file()}


def _comparable(figure: Figure, columns: dict[str, dict[str, Any]]) -> bool:
    """Whether all columns have the figure, of equally much data."""
    parts = [parts.get(figure.part) for parts in columns.values()]
    found = [part for part in parts if part is not None and figure.key in part]
    return bool(parts) and len(found) == len(parts) and len({part["limit"] for part in found}) == 1


def quality_table(name: str, ratios: list[int], results: Path = RESULTS) -> str:
    """What was measured of the base and of the plugin at each ratio; empty if nothing was.

    Args:
        name: name of the plugin's folder; see [`model_of`].
        ratios: the plugin's.
        results: folder of what was measured.
    """
    columns = _measured(name, ratios, results)
    rows = [
        [_title(figure), *(f"{parts[figure.part][figure.key]:.{figure.digits}f}" for parts in columns.values())]
        for figure in figures_of(name)
        if _comparable(figure, columns)
    ]
    return make_table(["", *columns], rows) if rows else ""


def seeds_table(name: str, ratios: list[int], results: Path = RESULTS) -> str:
    """What was measured of several trainings that differ in their seed alone; empty where there is one.

    Args:
        name: name of the plugin's folder; see [`model_of`].
        ratios: the plugin's.
        results: folder of what was measured; those of further seeds are in its `seeds`.
    """
    further = sorted(file.stem.removeprefix("run-") for file in (results / "seeds").glob(f"run-{name}-seed*.json"))
    first = _measured(name, ratios, results)
    runs = [first, *(_measured(each, ratios, results / "seeds") for each in further)]
    columns = [title for title in first if title != "base" and all(title in run for run in runs)]
    rows = []
    for figure in figures_of(name):
        if further and columns and all(_comparable(figure, run) for run in _beside_base(runs, columns)):
            values = [[run[title][figure.part][figure.key] for run in runs] for title in columns]
            cells = [_mean_and_range(each, figure.digits) for each in values]
            rows.append([_title(figure), f"{first['base'][figure.part][figure.key]:.{figure.digits}f}", *cells])
    if not rows:
        return ""
    heading = f"Trained {len(runs)} times with other seeds, the one above among them: mean, lowest and highest:"
    return f"{heading}\n\n" + make_table(["", "base", *columns], rows)


def _beside_base(runs: list[dict[str, dict[str, Any]]], columns: list[str]) -> list[dict[str, dict[str, Any]]]:
    """The columns of each run beside the base's, which the first one has."""
    return [{"base": runs[0]["base"], **{title: run[title] for title in columns}} for run in runs]


def _mean_and_range(values: list[float], digits: int) -> str:
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]"


def measured_values(name: str, ratios: list[int], results: Path = RESULTS) -> list[tuple[Figure, int, float]]:
    """What was measured of the plugin, as in [`quality_table`]: figure, ratio and value.

    Args:
        name: name of the plugin's folder; see [`model_of`].
        ratios: the plugin's.
        results: folder of what was measured.
    """
    columns = _measured(name, ratios, results)
    return [
        (figure, ratio, round(float(columns[f"k = {ratio}"][figure.part][figure.key]), figure.digits))
        for figure in figures_of(name)
        if _comparable(figure, columns)
        for ratio in ratios
        if f"k = {ratio}" in columns
    ]


def _title(figure: Figure) -> str:
    return figure.title if figure.more_is_better else f"{figure.title} (less is better)"


def _speeds(name: str, ratios: list[int], results: Path) -> dict[int, dict[str, Any]]:
    files = {k: results / f"speed-{name}-k{k}.json" for k in ratios}
    return {k: json.loads(file.read_text()) for k, file in files.items() if file.is_file()}


def in_int8(run: dict[str, Any]) -> bool:
    """Whether a run trained the plugin on its base in int8."""
    return "--int8" in run["command"]


def runs_before(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Command and steps of the runs that a run went on from, the first one first."""
    before = run.get("before")
    return [] if before is None else [*runs_before(before), before]


def commands_of(before: dict[str, Any]) -> list[str]:
    """Commands of a run that another one went on from: what trained it, and what resized it, if anything did."""
    return [before["command"], *([before["resized"]["command"]] if "resized" in before else [])]


def told_of_bits(run: dict[str, Any]) -> str:
    """What a run's copied neurons were shrunk to, in words; empty where they are whole."""
    return f"stored in {run['shrunk']['bits']} bits a number" if "shrunk" in run else ""


def told_of_changes(run: dict[str, Any]) -> str:
    """Which fields of a run's configuration were changed after the training, in words; empty where none were."""
    changed = ", ".join(f"{field}={value!r}" for field, value in run.get("changed", {}).items())
    return f"After the training its configuration was given {changed}, on which no weight depends." if changed else ""


def speed_table(name: str, ratios: list[int], results: Path = RESULTS) -> str:
    """How many times as fast as the base a plugin is, with machine and spread; empty if it was not measured.

    Args:
        name: name of the plugin's folder; see [`model_of`].
        ratios: the plugin's.
        results: folder of what was measured.
    """
    records = _speeds(name, ratios, results)
    if not records:
        return ""
    first = next(iter(records.values()))
    beside_int8 = "int8" in first["rows"][0]["speedup"]
    rows = []
    for index, row in enumerate(first["rows"]):
        cells = [record["rows"][index]["speedup"]["plugin"] for record in records.values()]
        cells = ([row["speedup"]["int8"]] if beside_int8 else []) + cells
        rows.append([_shape(row["batch"], row["length"]), *map(_spread, cells)])
    environment = first["environment"]
    busy = any(record["environment"]["cpu_in_use"] > QUIET for record in records.values())
    return (
        f"Times as fast as the base, median and quartiles, {environment['cpu']}, {environment['threads']} thread(s), "
        f"PyTorch {environment['torch']}, "
        + ("int8 beside the base in float32" if beside_int8 else "float32")
        + (", on a machine that others were using:\n\n" if busy else ":\n\n")
        + make_table(
            ["batch × length", *(["int8 alone"] if beside_int8 else []), *(f"k = {k}" for k in records)], rows
        )
    )


def _spread(speed: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{speed['median']:.2f} [{speed['low']:.2f}–{speed['high']:.2f}]"


def _shape(batch: int, length: int) -> str:
    return f"{batch}×{length}" if length else f"batch {batch}"


def _draw(plugins: dict[str, list[int]], results: Path, file: Path) -> bool:
    """Draw quality against speed of all plugins of a model; whether there was something to draw.

    Args:
        plugins: name of a folder → the plugin's ratios; the first is the model's own.
        results: folder of what was measured.
        file: the picture.
    """
    frontier = _frontier(plugins, results)
    if frontier is None:
        return False
    drawn, figure, name = frontier.plugins, frontier.figure, next(iter(plugins))
    plot, (axes,) = _plot(6, 4 + 0.1 * (len(drawn) - 1), 1, 1)
    _draw_frontier(axes, frontier)
    if len(drawn) > 1:
        plot.legend(loc="outside lower center", ncols=2, fontsize="small")
    first = next(iter(drawn.values()))[0]
    axes.set_xlabel(f"times as fast as the base at {first.shape}, {first.threads} CPU threads (right is better)")
    axes.set_ylabel(f"{figure.title}\n({'up' if figure.more_is_better else 'down'} is better)")
    title = f"{name} with its plugin (one seed)" if len(drawn) == 1 else f"{name} with its plugins (one seed each)"
    axes.set_title(f"{title}\nbars: quartiles of the time", fontsize=11)
    _save(plot, file)
    return True


def _draw_shipped(shipped: dict[str, list[int]], results: Path, file: Path) -> None:
    """Draw quality against speed of the plugins that are shipped, a panel each.

    Args:
        shipped: name of a folder → the plugin's ratios.
        results: folder of what was measured.
        file: the picture.
    """
    found = {name: _frontier({name: ratios}, results) for name, ratios in shipped.items()}
    frontiers = {name: frontier for name, frontier in found.items() if frontier is not None}
    columns = 3
    rows = -(-len(frontiers) // columns)
    plot, panels = _plot(11, 3.4 * rows, rows, columns)
    for axes, (name, frontier) in zip(panels, frontiers.items(), strict=False):
        _draw_frontier(axes, frontier)
        first = next(iter(frontier.plugins.values()))[0]
        better = "up" if frontier.figure.more_is_better else "down"
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"times as fast as the base, {first.shape}", fontsize=8)
        axes.set_ylabel(f"{frontier.figure.title}\n({better} is better)", fontsize=8)
        axes.tick_params(labelsize=8)
    for axes in panels[len(frontiers) :]:
        axes.set_axis_off()
    plot.suptitle("Plugins that are shipped, two CPU threads, bars: quartiles of the time", fontsize=11)
    _save(plot, file)


@dataclass(frozen=True)
class Frontier:
    """What is drawn of a model: the base's quality, and points by plugin."""

    figure: Figure
    base: float
    plugins: dict[str, list[Point]]


def _frontier(plugins: dict[str, list[int]], results: Path) -> Frontier | None:
    """Quality and speed of a model's plugins; `None` where no plugin has both."""
    name = next(iter(plugins))
    columns = {plugin: _measured(plugin, ratios, results) for plugin, ratios in plugins.items()}
    figure = next((each for each in figures_of(name) if _comparable(each, columns[name])), None)
    if figure is None:
        return None
    drawn = {
        plugin: _points(plugin, ratios, columns[plugin], figure, results)
        for plugin, ratios in plugins.items()
        if _comparable(figure, columns[plugin])
    }
    drawn = {plugin: points for plugin, points in drawn.items() if points}
    return Frontier(figure, columns[name]["base"][figure.part][figure.key], drawn) if drawn else None


def _plot(width: float, height: float, rows: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure, and its axes row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return plot, list(axes.flat)


def _draw_frontier(axes: Any, frontier: Frontier) -> None:
    """Draw the base and the points of each plugin."""
    base, drawn = frontier.base, frontier.plugins
    axes.axhline(base, color="0.7", linewidth=1, linestyle="--")
    axes.plot([1], [base], "o", color="black")
    axes.annotate("base", (1, base), xytext=(6, 6), textcoords="offset points")
    for number, (plugin, points) in enumerate(drawn.items()):
        medians = [point.speed["median"] for point in points]
        below = [point.speed["median"] - point.speed["low"] for point in points]
        above = [point.speed["high"] - point.speed["median"] for point in points]
        heights = [point.quality for point in points]
        color = f"C{number}"
        axes.errorbar(medians, heights, xerr=[below, above], fmt="o-", capsize=3, color=color, label=plugin)
        for point, following in zip(points, [*points[1:], points[-1]], strict=True):
            place = (point.speed["median"], point.quality)
            down = -14 if following.quality > point.quality else 6  # where the line to the next point is not
            # Where there are several, only where each ends: the labels of all would lie on each other.
            if len(drawn) == 1 or point is points[-1]:
                axes.annotate(f"k = {point.ratio}", place, xytext=(6, down), textcoords="offset points", color=color)
    # A scale that makes a tenth of a point look like a fall says something that is not so.
    axes.margins(x=0.2, y=0.12)  # the labels stay inside
    low, high = axes.get_ylim()
    room = max(0.12 * (high - low), 0.04 * abs(base) - (high - low)) / 2
    axes.set_ylim(low - room, high + room)
    axes.grid(alpha=0.3)


def _save(plot: Any, file: Path) -> None:
    """Write a picture, whole or not at all."""
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        plot.savefig(Path(folder) / file.name, dpi=150)
        (Path(folder) / file.name).rename(file)
    pyplot.close(plot)


@dataclass(frozen=True)
class Point:
    """A plugin at one ratio, as it is drawn: `speed` is how many times as fast as the base, by quantile."""

    ratio: int
    quality: float
    speed: dict[str, float]
    shape: str
    threads: int


def _points(
    plugin: str, ratios: list[int], columns: dict[str, dict[str, Any]], figure: Figure, results: Path
) -> list[Point]:
    """What was measured in both ways."""
    points = []
    for k, record in _speeds(plugin, ratios, results).items():
        if f"k = {k}" in columns:
            row = _main_row(model_of(plugin), record["rows"])
            quality = columns[f"k = {k}"][figure.part][figure.key]
            shape, threads = _shape(row["batch"], row["length"]), record["environment"]["threads"]
            points.append(Point(k, quality, row["speedup"]["plugin"], shape, threads))
    return points


def _main_row(model: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shape = MAIN_SHAPE.get(model or "")
    return next((row for row in rows if (row["batch"], row["length"]) == shape), rows[0])


def shipped_table(shipped: dict[str, list[int]], plugins: Path = PLUGINS, results: Path = RESULTS) -> str:
    """What the plugins that are shipped lose and gain, at one ratio each.

    Args:
        shipped: name of a folder → the plugin's ratios.
        plugins: folder of the plugins.
        results: folder of what was measured.
    """
    rows = []
    for name in shipped:
        k, parts = SHOWN_RATIO[name], SHOWN_FIGURES[WEIGHTS[name].kind]
        columns = _measured(name, [k], results)
        figures = [
            each
            for part in parts
            for each in [next(figure for figure in FIGURES[WEIGHTS[name].kind] if figure.part == part)]
            if _comparable(each, columns)
        ]
        speeds = [
            f"{_shape(row['batch'], row['length'])}: {_spread(row['speedup']['plugin'])}"
            for record in _speeds(name, [k], results).values()
            for row in record["rows"]
        ]
        values = ["<br>".join(f"{c[f.part][f.key]:.{f.digits}f}" for f in figures) for c in columns.values()]
        size = (plugins / name / "adapter_model.safetensors").stat().st_size / 1e6
        card = f"[{name}](examples/plugins/{name}/README.md), k = {k}, {size:.1f} MB"
        rows.append([card, "<br>".join(map(_title, figures)), *values, "<br>".join(speeds)])
    return make_table(["plugin", "measured by", "base", "with it", "times as fast"], rows, text_columns=2)


def write_readme(readme: Path, plugins: Path = PLUGINS, results: Path = RESULTS) -> None:
    """Renew the README's table of the plugins that are shipped, and its picture.

    Args:
        readme: a page with the markers `shipped`.
        plugins: folder of the plugins that are shipped.
        results: folder of what was measured.
    """
    shipped = {
        name: json.loads((results / f"run-{name}.json").read_text())["recipe"]["ratios"]
        for name in SHOWN_RATIO
        if (plugins / name).is_dir()
    }
    _draw_shipped(shipped, results, readme.parent / "docs" / "images" / "frontiers.png")
    write_text(readme, replace_between(readme.read_text(), "shipped", shipped_table(shipped, plugins, results)))


def write_page(page: Path, plugins: Path = PLUGINS, results: Path = RESULTS) -> list[str]:
    """Renew the part of the page that is made of JSON, and the pictures beside it.

    Args:
        page: a page with the markers `real-models`.
        plugins: folder of the plugins that are shipped.
        results: folder of what was measured.

    Returns:
        Names of the plugins on the page.
    """
    parts = []
    names = sorted(file.stem.removeprefix("run-") for file in results.glob("run-*.json"))
    runs = {name: json.loads((results / f"run-{name}.json").read_text()) for name in names}
    for model in sorted(WEIGHTS):
        ratios = {name: run["recipe"]["ratios"] for name, run in runs.items() if model_of(name) == model}
        picture = page.parent / "images" / f"frontier-{model}.png"
        pictured = bool(ratios) and _draw(ratios, results, picture)
        for name in ratios:
            lines = [f"### {name}", _conditions(runs[name], (plugins / name).is_dir())]
            if pictured and name == next(iter(ratios)):
                lines.append(f"![Quality against speed of {model} with its plugin](images/{picture.name})")
            lines += [quality_table(name, ratios[name], results), seeds_table(name, ratios[name], results)]
            lines.append(speed_table(name, ratios[name], results))
            for folder, processor in ELSEWHERE.items():
                table = speed_table(name, ratios[name], results / folder)
                lines += [f"{processor}:", table] if table else []
            parts.append("\n\n".join(line for line in lines if line))
    write_text(page, replace_between(page.read_text(), "real-models", "\n\n".join(parts)))
    return names


def _conditions(run: dict[str, Any], shipped: bool) -> str:
    recipe, count = run["recipe"], run["parameters"]["plugin"]
    share = 100 * count / run["parameters"]["base"]
    told = "" if shipped else "Not shipped. "
    told += f"{changes} " if (changes := told_of_changes(run)) else ""
    if in_int8(run):
        told += "Base and plugin are in int8 here; what they are held against is the base in float32. "
    before = runs_before(run)
    commands = [command for each in before for command in commands_of(each)] + [run["command"]]
    commands += [run["shrunk"]["command"]] if "shrunk" in run else []
    stored = f", {told_of_bits(run)} where they are copied neurons" if "shrunk" in run else ""
    steps = "".join(f"{each['steps']} and then " for each in before)
    return (
        f"{told}{count:,} parameters ({share:.1f} % of the base's){stored}, "
        f"{steps}{recipe['steps']} steps of {recipe['batch_size']} examples, one seed. Trained by\n\n"
        "```sh\n" + "\n".join(commands) + "\n```"
    )


def main() -> None:
    """Renew docs/results.md and the README's table."""
    page = DOCS / "results.md"
    names = write_page(page)
    write_readme(DOCS.parent / "README.md")
    print(f"Wrote {page}, the table of README.md, and the pictures of {', '.join(names)}.")
    print("Next: look at docs/images/frontier*.png, then `make docs`.")


if __name__ == "__main__":
    main()
