"""What plugins of real models lose, and how much faster they are: tables and a picture a model, of `results/*.json`.

python examples/real_models/frontier.py
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights import WEIGHTS

from peft_variator import VariatorConfig
from peft_variator.files import write_text
from peft_variator.markdown import make_table, replace_between


__all__ = ["quality_table", "speed_table", "trained_ratios", "write_page"]

RESULTS = Path(__file__).parent / "results"
PLUGINS = Path(__file__).parents[1] / "plugins"
DOCS = Path(__file__).parents[2] / "docs"
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
# The shape that is drawn where the first of a record isn't the one that people ask for.
MAIN_SHAPE = {"all-mpnet-base-v2": (8, 128), "dinov2-vit-s14": (8, 0)}


def trained_ratios(folder: Path) -> list[int]:
    """The compression ratios that a saved plugin was trained for, smallest first."""
    config = VariatorConfig.from_pretrained(str(folder))
    return list(config.trained_ratios or [config.compression_ratio])


def _measured(name: str, ratios: list[int], results: Path) -> dict[str, dict[str, Any]]:
    """Title of a column → the parts that were measured."""
    files = {"base": results / f"base-{name}.json"}
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
        name: a key of `WEIGHTS`.
        ratios: the plugin's.
        results: folder of what was measured.
    """
    columns = _measured(name, ratios, results)
    rows = [
        [_title(figure), *(f"{parts[figure.part][figure.key]:.{figure.digits}f}" for parts in columns.values())]
        for figure in FIGURES[WEIGHTS[name].kind]
        if _comparable(figure, columns)
    ]
    return make_table(["", *columns], rows) if rows else ""


def _title(figure: Figure) -> str:
    return figure.title if figure.more_is_better else f"{figure.title} (less is better)"


def _speeds(name: str, ratios: list[int], results: Path) -> dict[int, dict[str, Any]]:
    files = {k: results / f"speed-{name}-k{k}.json" for k in ratios}
    return {k: json.loads(file.read_text()) for k, file in files.items() if file.is_file()}


def speed_table(name: str, ratios: list[int], results: Path = RESULTS) -> str:
    """How many times as fast as the base a plugin is, with machine and spread; empty if it was not measured.

    Args:
        name: a key of `WEIGHTS`.
        ratios: the plugin's.
        results: folder of what was measured.
    """
    records = _speeds(name, ratios, results)
    if not records:
        return ""
    first = next(iter(records.values()))
    rows = []
    for index, row in enumerate(first["rows"]):
        cells = [record["rows"][index]["speedup"]["plugin"] for record in records.values()]
        shown = [f"{each['median']:.2f} [{each['low']:.2f}–{each['high']:.2f}]" for each in cells]
        rows.append([_shape(row["batch"], row["length"]), *shown])
    environment = first["environment"]
    busy = any(record["environment"]["cpu_in_use"] > QUIET for record in records.values())
    return (
        f"Times as fast as the base, median and quartiles, {environment['cpu']}, {environment['threads']} thread(s), "
        f"PyTorch {environment['torch']}, float32"
        + (", on a machine that others were using:\n\n" if busy else ":\n\n")
        + make_table(["batch × length", *(f"k = {k}" for k in records)], rows)
    )


def _shape(batch: int, length: int) -> str:
    return f"{batch}×{length}" if length else f"batch {batch}"


def _draw(name: str, ratios: list[int], results: Path, file: Path) -> bool:
    """Draw quality against speed; whether there was something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, records = _measured(name, ratios, results), _speeds(name, ratios, results)
    figure = next((each for each in FIGURES[WEIGHTS[name].kind] if _comparable(each, columns)), None)
    ratios = [k for k in ratios if k in records and f"k = {k}" in columns]
    if figure is None or not ratios:
        return False
    quality = {title: parts[figure.part][figure.key] for title, parts in columns.items()}
    rows = {k: _main_row(name, records[k]["rows"]) for k in ratios}
    speeds = {k: row["speedup"]["plugin"] for k, row in rows.items()}
    plot, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.axhline(quality["base"], color="0.7", linewidth=1, linestyle="--")
    axes.plot([1], [quality["base"]], "o", color="black")
    axes.annotate("base", (1, quality["base"]), xytext=(6, 6), textcoords="offset points")
    medians = [speeds[k]["median"] for k in ratios]
    below = [speeds[k]["median"] - speeds[k]["low"] for k in ratios]
    above = [speeds[k]["high"] - speeds[k]["median"] for k in ratios]
    heights = [quality[f"k = {k}"] for k in ratios]
    axes.errorbar(medians, heights, xerr=[below, above], fmt="o-", capsize=3, color="tab:blue", label="plugin")
    for k, x, y in zip(ratios, medians, heights, strict=True):
        axes.annotate(f"k = {k}", (x, y), xytext=(6, -12), textcoords="offset points")
    # A scale that makes a tenth of a point look like a fall says something that is not so.
    low, high = axes.get_ylim()
    room = max(0.0, 0.04 * abs(quality["base"]) - (high - low)) / 2
    axes.set_ylim(low - room, high + room)
    first = rows[ratios[0]]
    shape, environment = _shape(first["batch"], first["length"]), records[ratios[0]]["environment"]
    axes.set_xlabel(f"times as fast as the base at {shape}, {environment['threads']} CPU thread(s) (right is better)")
    axes.set_ylabel(f"{figure.title}\n({'up' if figure.more_is_better else 'down'} is better)")
    axes.set_title(f"{name} with its plugin (one seed)\nbars: quartiles of the time", fontsize=11)
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        plot.savefig(Path(folder) / file.name, dpi=150)
        (Path(folder) / file.name).rename(file)
    pyplot.close(plot)
    return True


def _main_row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shape = MAIN_SHAPE.get(name)
    return next((row for row in rows if (row["batch"], row["length"]) == shape), rows[0])


def write_page(page: Path, plugins: Path = PLUGINS, results: Path = RESULTS) -> list[str]:
    """Renew the part of the page that is made of JSON, and the pictures beside it.

    Args:
        page: a page with the markers `real-models`.
        plugins: folder of the plugins that are shipped.
        results: folder of what was measured.

    Returns:
        Names of the models on the page.
    """
    parts, names = [], []
    for folder in sorted(plugins.iterdir()):
        name = folder.name
        if name not in WEIGHTS or not (folder / "adapter_config.json").is_file():
            continue
        ratios = trained_ratios(folder)
        run = json.loads((results / f"run-{name}.json").read_text())
        share = 100 * run["parameters"]["plugin"] / run["parameters"]["base"]
        lines = [f"### {name}", _conditions(run, share)]
        if _draw(name, ratios, results, page.parent / "images" / f"frontier-{name}.png"):
            lines.append(f"![Quality against speed of {name} with its plugin](images/frontier-{name}.png)")
        lines += [quality_table(name, ratios, results), speed_table(name, ratios, results)]
        parts.append("\n\n".join(line for line in lines if line))
        names.append(name)
    write_text(page, replace_between(page.read_text(), "real-models", "\n\n".join(parts)))
    return names


def _conditions(run: dict[str, Any], share: float) -> str:
    recipe = run["recipe"]
    return (
        f"{run['parameters']['plugin']:,} parameters ({share:.1f} % of the base's), {recipe['steps']} steps of "
        f"{recipe['batch_size']} examples, one seed. Trained by\n\n```sh\n{run['command']}\n```"
    )


def main() -> None:
    """Renew docs/results.md."""
    page = DOCS / "results.md"
    names = write_page(page)
    print(f"Wrote {page} and the pictures of {', '.join(names)}.")
    print("Next: look at docs/images/frontier-*.png, then `make docs`.")


if __name__ == "__main__":
    main()
