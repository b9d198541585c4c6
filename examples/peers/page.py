"""The page and the picture of the peers, made of the JSON that `run.py` wrote."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_variator.files import replacing, write_text
from peft_variator.markdown import make_table, replace_between


__all__ = ["Figure", "advice", "equally_fast", "table", "trained_alike", "write_page"]

NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Figure:
    """A figure of quality.

    Args:
        part: of the quality that was measured.
        key: of the figure in there.
        title: heading of its column.
        unit: of what is lost.
        shown: format of a value.
        error: key of its standard error, where there is one.
        sign: 1 where more is better, -1 where less is.
        close: what may be lost by what is advised.
        much: below the base, down to which the picture goes where some contenders lose many more.
    """

    part: str
    key: str
    title: str
    unit: str = ""
    shown: str = "{:.2f}"
    error: str | None = None
    sign: int = 1
    close: tuple[float, ...] = (1.0,)
    much: float = 4.5


# Of each kind of model, the first being that by which contenders are ranked.
_AFTER, _NLL = "wikitext2-256", "WikiText-2 after 256 tokens, NLL (less is better)"
FIGURES = {
    "text": (
        Figure("stsb", "spearman", "STS-B, Spearman × 100", "points of STS-B"),
        Figure("sst2", "accuracy", "SST-2, accuracy %"),
    ),
    "vision": (Figure("cifar10", "accuracy", "CIFAR-10, accuracy %", "points", "{:.2f} %"),),
    "causal": (
        Figure(_AFTER, "nll", _NLL, "nats", "{:.3f}", sign=-1, close=(0.02, 0.1), much=0.5),
        Figure(_AFTER, "nll_above_base", "above the base's", shown="{:+.3f}", error="nll_above_base_error"),
        Figure(_AFTER, "kl", "KL from the base", shown="{:.3f}", error="kl_error"),
    ),
}
# What is neither trained nor a number format, and how that is called: of each kind of model.
UNTRAINED = {
    "text": ("token merging", "merging tokens"),
    "vision": ("patch merging", "merging patches"),
    "causal": ("layers dropped", "dropping layers"),
}
COUNTED = {"vision": "112 pixels a side", "causal": "a prefill of 512 tokens"}


def write_page(results: Path, docs: Path) -> None:
    """Renew the tables of docs/peers.md, and the picture of each base whose speed was measured.

    Args:
        results: folder of the JSON.
        docs: folder of the page.
    """
    body = []
    kinds = ("quality", "speed")
    names = {file.stem.partition("-")[2] for kind in kinds for file in results.glob(f"{kind}-*.json")}
    # Those of random weights, which have no quality, come last.
    for name in sorted(names, key=lambda name: (not (results / f"quality-{name}.json").is_file(), name.lower())):
        files = {kind: results / f"{kind}-{name}.json" for kind in kinds}
        quality, speed = (
            json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files.values()
        )
        timed = speed["rows"][0]["speedup"] if speed.get("rows") else {}
        quality = quality or {"contenders": {each: {} for each in ("base", *timed)}}
        kind = kind_of(quality)
        body.append(f"## {name}\n\n{table(quality, speed)}")
        if some := limits(quality):
            body.append(some)
        if speed.get("rows"):
            where, row = speed["environment"], speed["rows"][0]
            body.append(
                f"Base: {row['seconds']:.3f} s for {row['batch']}×{row['length']}. {where['cpu']}, "
                f"{where['threads']} thread(s), PyTorch {where['torch']}. By `{'`, `'.join(speed['commands'])}`."
            )
        if kind is None:
            body.append("Random weights: speed alone. The plugin is as it starts: " + _fields(speed["plugin"]) + ".")
            continue
        if speed.get("rows"):
            plot(quality, speed, docs / "images" / f"peers-{name}.svg", name)
            body.append(f"![Speed and quality of {name} and its peers](images/peers-{name}.svg)")
        if alike := trained_alike(quality, speed, sorted(results.glob(f"trained-{name}-*.json"))):
            body.append(alike)
        if kind != "text":
            told = f"A plugin is trained, and {UNTRAINED[kind][1]} is not; FLOPs are of {COUNTED[kind]}."
            body.append(f"### At equal cost\n\n{told}\n\n{_numbered(equally_fast(quality, speed))}")
        if kind != "vision":
            advised = "### Which should I use?\n\n" + _numbered(advice(quality, speed))
            body.append(advised if speed.get("rows") else f"Speed: {NOT_YET}, so that nothing is advised.")
    page = docs / "peers.md"
    write_text(page, replace_between(page.read_text(encoding="utf-8"), "peers", "\n\n".join(body)))


def _fields(plugin: dict[str, Any]) -> str:
    """Fields of a configuration; of the layers the first and the last."""
    layers = plugin["layers_to_transform"]
    shown = plugin | {"layers_to_transform": f"{layers[0]} to {layers[-1]}"}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _numbered(lines: list[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def kind_of(quality: dict[str, Any]) -> str | None:
    """The kind of model by what was measured: a key of `FIGURES`, or `None` where nothing was."""
    measured = {part for entry in quality["contenders"].values() for part in entry.get("parts", {})}
    return next((kind for kind, some in FIGURES.items() if any(each.part in measured for each in some)), None)


def figures_of(quality: dict[str, Any]) -> tuple[Figure, ...]:
    """The figures of these contenders' kind, the one by which they are ranked first."""
    kind = kind_of(quality)
    return FIGURES[kind] if kind else ()


def table(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """One row a contender: quality, FLOPs where counted, and how many times as fast as the base at each shape."""
    names = list(quality["contenders"])
    shapes = [(row["batch"], row["length"]) for row in speed.get("rows", [])]
    figures, counted = figures_of(quality), any("flops" in entry for entry in quality["contenders"].values())
    head = ["", *[figure.title for figure in figures], *(["FLOPs of the base's"] if counted else [])]
    rows = []
    for name in names:
        missing = quality["contenders"][name].get("missing")
        cells = [_cell(quality, name, figure) for figure in figures]
        if counted:
            share = flops_share(quality, name)
            cells.append("–" if share is None else f"{share:.0%}")
        times = [_times(row, name) for row in speed.get("rows", [])]
        rows.append([f"{name} ({missing})" if missing else name, *cells, *times])
    return make_table([*head, *[f"{b}×{n}, times as fast" for b, n in shapes]], rows)


def _cell(quality: dict[str, Any], name: str, figure: Figure) -> str:
    found = quality["contenders"][name].get("parts", {}).get(figure.part, {})
    if figure.key not in found or (figure.error and name == "base"):
        return "–"
    shown = figure.shown.removesuffix(" %").format(found[figure.key])
    error = found.get(figure.error)
    return shown if error is None else f"{shown} ± {error:.3f}"


def limits(quality: dict[str, Any]) -> str:
    """Of how many rows the figures are that are not of all; "" if all are."""
    counts: dict[str, set[tuple[int, int]]] = {}
    fewest: list[int] = []
    for entry in quality["contenders"].values():
        for part, found in entry.get("parts", {}).items():
            if found.get("limit") is not None:
                rows = next(found[key] for key in ("test", "pairs", "prompts") if key in found)
                counts.setdefault(part, set()).add((found.get("train", 0), rows))
                fewest += [rows] if "test" in found else []
    titles = {figure.part: figure.title.partition(",")[0] for some in FIGURES.values() for figure in reversed(some)}
    told = []
    for part, some in counts.items():
        tests = "prompts" if kind_of(quality) == "causal" else "to test"
        each = [(f"{train} rows to train the probe and " if train else "") + f"{rows} {tests}" for train, rows in some]
        told.append(f"{titles[part]}: {', or '.join(sorted(each))}")
    error = f" The standard error of an accuracy is {50 / min(fewest) ** 0.5:.1f} points at most." if fewest else ""
    if any(figure.error for figure in figures_of(quality)):
        error = " ± is the standard error of the mean over prompts; of the NLL, of its difference from the base's."
    return f"Not of all rows: {'; '.join(told)}.{error}" if told else ""


def trained_alike(quality: dict[str, Any], speed: dict[str, Any], files: list[Path]) -> str:
    """What each contender that was trained makes of the same steps, and which loses least; "" if none was trained."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not records:
        return ""
    base, rows, losses = scores(quality, "base")[0], [], {}
    for record in records:
        name = record["contender"]
        found = scores(quality, name)[0]
        if found is not None and base is not None:
            losses[name] = (found - base, record["flops_share"])
        rows.append(
            [
                name,
                f"{record['flops_share']:.1%}",
                f"{record['trained_parameters'] / 1e6:.1f} M",
                f"{record['learning_rate']:g}",
                f"{record['steps']}",
                f"{losses[name][0]:+.2f}" if name in losses else NOT_YET,
                f"{times:.2f}" if (times := _median(speed, name)) is not None else NOT_YET,
            ]
        )
    head = ["", "FLOPs of the base's", "trained", "peak learning rate", "steps", "STS-B, points", "times as fast"]
    lines = [
        "### Trained alike",
        "The same text in the same order, batches of "
        f"{', '.join(sorted({str(record['batch_size']) for record in records}))}, seed, schedule, loss and precision "
        "(bfloat16); FLOPs of a text of 128 tokens. These are few steps. "
        "Where all weights are trained the learning rate is lower, and what is trained is a model of its own, for one "
        "speed; a plugin leaves the base as it is, and serves other ratios too.",
        make_table(head, rows),
    ]
    if len(losses) > 1:
        ranked = sorted(losses, key=lambda name: losses[name], reverse=True)
        told = ", ".join(f"{name} {losses[name][0]:+.2f} at {losses[name][1]:.0%} of the FLOPs" for name in ranked)
        lines.append(f"Least lost on STS-B after these steps, in order: {told}.")
    return "\n\n".join(lines)


def scores(quality: dict[str, Any], name: str) -> tuple[float | None, ...]:
    """The figures of a contender, the one by which it is ranked first; `None`: not measured."""
    parts = quality["contenders"].get(name, {}).get("parts", {})
    return tuple(parts.get(figure.part, {}).get(figure.key) for figure in figures_of(quality)) or (None,)


def gained(quality: dict[str, Any], name: str) -> float | None:
    """How much better than the base a contender is, by the first figure; `None`: not measured."""
    found, base = scores(quality, name)[0], scores(quality, "base")[0]
    return None if found is None or base is None else figures_of(quality)[0].sign * (found - base)


def flops_share(quality: dict[str, Any], name: str) -> float | None:
    """FLOPs of a contender ÷ the base's; `None`: not counted."""
    found, base = (quality["contenders"].get(each, {}).get("flops") for each in (name, "base"))
    return found / base if found and base else None


def _times(row: dict[str, Any], name: str) -> str:
    if name == "base":
        return "1"
    found = row["speedup"].get(name)
    return f"{found['median']:.2f} [{found['low']:.2f}–{found['high']:.2f}]" if found else "–"


def _median(speed: dict[str, Any], name: str) -> float | None:
    rows = speed.get("rows", [])
    if name == "base":
        return 1.0
    return rows[0]["speedup"].get(name, {}).get("median") if rows else None


def advice(quality: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """Lines with the measured figures, whoever wins; what was not measured is said."""
    kind, figure = kind_of(quality) or "text", figures_of(quality)[0]

    def gain(name: str) -> float | None:
        return gained(quality, name)

    def shown(points: float) -> str:
        digits = 2 if figure.sign > 0 else 3
        return f"{figure.sign * points:+.{digits}f} {figure.unit}"

    def figures(name: str) -> str:
        times, points = _median(speed, name), gain(name)
        told = NOT_YET if points is None else shown(points)
        return f"{'speed ' + NOT_YET if times is None else f'{times:.2f}×'}, {told}"

    def best(*prefixes: str) -> str | None:
        """The fastest that loses little enough, or else the one that loses least."""
        named = {name: gain(name) for name in quality["contenders"] if name.startswith(prefixes)}
        kept = {name: points for name, points in named.items() if points is not None}
        close = [name for name, points in kept.items() if points >= -figure.close[-1]]
        if close:
            return max(close, key=lambda name: (_median(speed, name) or 0, kept[name]))
        return max(kept, key=lambda name: kept[name]) if kept else None

    def told(*prefixes: str) -> str:
        name = best(*prefixes)
        return f"{name} ({figures(name)})" if name else f"{prefixes[0]} ({NOT_YET})"

    def on_top(form: str) -> str:
        """The fastest plugin on a base in another number format, beside that base alone."""
        rows = [name for name in quality["contenders"] if name.startswith(f"{form} + plugin")]
        timed = [name for name in rows if _median(speed, name) is not None and gain(name) is not None]
        alone, under = _median(speed, form), gain(form)
        if not timed or alone is None or under is None:
            return f"of {form}: speed {NOT_YET}"
        name = max(timed, key=lambda each: _median(speed, each) or 0)
        times, points = (_median(speed, name) or 0) / alone, (gain(name) or 0) - under
        verdict = "" if times > 1 else ", which gains nothing"
        return f"of {form}: {name} is {times:.2f} times as fast as {form} alone, {shown(points)}{verdict}"

    def fastest(within: float) -> str:
        close = [
            (times, name)
            for name in quality["contenders"]
            if (times := _median(speed, name)) is not None and (points := gain(name)) is not None and points >= -within
        ]
        winner = f"{max(close)[1]} ({figures(max(close)[1])})" if close and speed.get("rows") else NOT_YET
        return f"within {within} {figure.unit}: {winner}"

    integers = ["int8", *{"causal": ["int8 in part"], "text": ["int8 by channel", "int8 attention"]}.get(kind, [])]
    other = {
        "text": f"Another runtime is no problem: {told('ONNX Runtime')}; "
        f"another model is none: {told('next-smaller')}.",
        "causal": "The tokens that are generated after the prompt are computed in the same format, or by the layers "
        "that are left; a plugin is for the prompt alone, and leaves them as fast as they were. That was not timed.",
    }
    return [
        f"Nothing to be trained, one line: bf16 ({figures('bf16')}), where the processor multiplies in it; "
        + "; ".join(f"{form} ({figures(form)})" for form in integers)
        + ".",
        "A plugin, trained once, on top " + "; ".join(on_top(form) for form in ("bf16", *integers)) + ".",
        f"float32 has to stay: {told('plugin')}, whose k changes by load; "
        f"without training {told(UNTRAINED[kind][0])}.",
        other[kind],
        f"The fastest of all {'; '.join(fastest(within) for within in figure.close)}.",
    ]


def equally_fast(quality: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """Each plugin beside what needs no training and is closest to its speed, or to its FLOPs until that is timed."""
    figure, (prefix, doing) = figures_of(quality)[0], UNTRAINED[kind_of(quality) or "vision"]

    def cost(name: str) -> float | None:
        share = flops_share(quality, name)
        return _median(speed, name) if speed.get("rows") else 1 / share if share else None

    def told(name: str) -> str:
        share = flops_share(quality, name)
        how = f"{cost(name):.2f}×" if speed.get("rows") else f"{share:.0%} of the FLOPs"
        return f"{name} ({how}, {figure.shown.format(scores(quality, name)[0])})"

    def known(prefix: str) -> list[str]:
        names = [name for name in quality["contenders"] if name.startswith(prefix)]
        return [name for name in names if cost(name) is not None and scores(quality, name)[0] is not None]

    peers, lines = known(prefix), []
    for name in known("plugin") if peers else ():
        pace = cost(name) or 0
        peer = min(peers, key=lambda each: abs((cost(each) or 0) - pace))
        ahead = (gained(quality, name) or 0) - (gained(quality, peer) or 0)
        better = "the plugin" if ahead >= 0 else doing
        lines.append(f"{told(name)} beside {told(peer)}: {better} is {abs(ahead):.2f} {figure.unit} better.")
    return lines or [f"A plugin beside {doing} at equal speed: {NOT_YET}."]


def plot(quality: dict[str, Any], speed: dict[str, Any], path: Path, name: str) -> None:
    """Speed against the first figure, with the line of those that no other beats in both."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = name
    from matplotlib import pyplot as plt

    row, unit = speed["rows"][0], "pixels a side" if kind_of(quality) == "vision" else "tokens"
    by = figures_of(quality)[0]
    points = {}
    for contender in quality["contenders"]:
        times, score = _median(speed, contender), scores(quality, contender)[0]
        if times is not None and score is not None:
            points[contender] = (times, score)
    families: dict[str, dict[str, tuple[float, float]]] = {}
    for contender, point in points.items():
        family, _, setting = (
            contender.rpartition(", ") if re.search(r", (k = )?\d", contender) else (contender, "", "")
        )
        families.setdefault(family, {})[setting] = point
    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    front = sorted(
        p
        for p in points.values()
        if not any(o != p and o[0] >= p[0] and by.sign * (o[1] - p[1]) >= 0 for o in points.values())
    )
    axes.plot(*zip(*front, strict=True), color="0.8", linewidth=6, zorder=0, label="none is better in both")
    base = points["base"][1]
    ranked = sorted((score for _, score in points.values()), key=lambda score: by.sign * score)
    bottom, top = base - by.sign * by.much, ranked[-1] + by.sign * by.much / 15
    if by.sign * (ranked[0] - bottom) < 0:
        axes.set_ylim(bottom, top)
    elif by.sign < 0:
        axes.invert_yaxis()
    for number, (family, settings) in enumerate(families.items()):
        hidden = [
            f"{setting}: {score:.1f}" if setting else f"{score:.1f}"
            for setting, (_, score) in settings.items()
            if by.sign * (score - bottom) < 0
        ]
        label = f"{family}\n(below: {'; '.join(hidden)})" if hidden else family
        marker, colour = "^" if "plugin" in family else "o", plt.get_cmap("tab20")(number * 2 % 20 + number // 10)
        axes.plot(*zip(*settings.values(), strict=True), f"{marker}-", color=colour, linewidth=1, label=label)
        for setting, point in settings.items():
            where = {"xytext": (4, 3), "textcoords": "offset points", "annotation_clip": True}
            axes.annotate(setting.removeprefix("k = "), point, fontsize=7, color=colour, **where)
    axes.axhline(base, color="0.6", linewidth=0.8, linestyle="--")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.set(
        title=f"{name}, {row['batch']}×{row['length']} {unit}: up and to the right is better",
        xlabel="times as fast as the base",
        ylabel=by.title,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
