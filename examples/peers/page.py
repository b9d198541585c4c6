"""The page and the picture of the peers, made of the JSON that `run.py` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft_variator.files import replacing, write_text
from peft_variator.markdown import make_table, replace_between


__all__ = ["advice", "equally_fast", "table", "trained_alike", "write_page"]

NOT_YET = "not measured yet"
MUCH = 4.5
"""Points below the base down to which the picture goes where some contenders lose many more."""
# What is measured, the first one of a model being that by which its contenders are ranked: part, key and heading.
FIGURES = (
    ("stsb", "spearman", "STS-B, Spearman × 100"),
    ("sst2", "accuracy", "SST-2, accuracy %"),
    ("cifar10", "accuracy", "CIFAR-10, accuracy %"),
)


def write_page(results: Path, docs: Path) -> None:
    """Renew the tables of docs/peers.md, and the picture of each base whose speed was measured.

    Args:
        results: folder of the JSON.
        docs: folder of the page.
    """
    body = []
    for file in sorted(results.glob("quality-*.json")):
        name = file.stem.removeprefix("quality-")
        quality = json.loads(file.read_text(encoding="utf-8"))
        speed_file = results / f"speed-{name}.json"
        speed = json.loads(speed_file.read_text(encoding="utf-8")) if speed_file.is_file() else {}
        body.append(f"## {name}\n\n{table(quality, speed)}")
        if some := limits(quality):
            body.append(some)
        if speed.get("rows"):
            where, row = speed["environment"], speed["rows"][0]
            body.append(
                f"Base: {row['seconds']:.3f} s for {row['batch']}×{row['length']}. {where['cpu']}, "
                f"{where['threads']} thread(s), PyTorch {where['torch']}. By `{'`, `'.join(speed['commands'])}`."
            )
            plot(quality, speed, docs / "images" / f"peers-{name}.svg", name)
            body.append(f"![Speed and quality of {name} and its peers](images/peers-{name}.svg)")
        if alike := trained_alike(quality, speed, sorted(results.glob(f"trained-{name}-*.json"))):
            body.append(alike)
        if of_pictures(quality):
            told = "A plugin is trained, and merging is not; FLOPs are of 112 pixels a side."
            body.append(f"### At equal cost\n\n{told}\n\n{_numbered(equally_fast(quality, speed))}")
        elif speed.get("rows"):
            body.append("### Which should I use?\n\n" + _numbered(advice(quality, speed)))
        else:
            body.append(f"Speed: {NOT_YET}, so that nothing is advised.")
    page = docs / "peers.md"
    write_text(page, replace_between(page.read_text(encoding="utf-8"), "peers", "\n\n".join(body)))


def _numbered(lines: list[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def of_pictures(quality: dict[str, Any]) -> bool:
    """Whether these are contenders of a vision encoder."""
    return any("cifar10" in entry.get("parts", {}) for entry in quality["contenders"].values())


def table(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """One row a contender: quality, FLOPs where counted, and how many times as fast as the base at each shape."""
    names = list(quality["contenders"])
    shapes = [(row["batch"], row["length"]) for row in speed.get("rows", [])]
    figures = FIGURES[2:] if of_pictures(quality) else FIGURES[:2]
    head = ["", *[title for *_, title in figures], *(["FLOPs of the base's"] if of_pictures(quality) else [])]
    rows = []
    for name in names:
        missing = quality["contenders"][name].get("missing")
        values = scores(quality, name)
        cells = [f"{value:.2f}" if value is not None else "–" for value in values[: len(figures)]]
        if of_pictures(quality):
            share = flops_share(quality, name)
            cells.append("–" if share is None else f"{share:.0%}")
        times = [_times(row, name) for row in speed.get("rows", [])]
        rows.append([f"{name} ({missing})" if missing else name, *cells, *times])
    return make_table([*head, *[f"{b}×{n}, times as fast" for b, n in shapes]], rows)


def limits(quality: dict[str, Any]) -> str:
    """Of how many rows the figures are that are not of all; "" if all are."""
    counts: dict[str, set[tuple[int, int]]] = {}
    fewest: list[int] = []
    for entry in quality["contenders"].values():
        for part, found in entry.get("parts", {}).items():
            if found.get("limit") is not None:
                rows = found.get("test", found.get("pairs"))
                counts.setdefault(part, set()).add((found.get("train", 0), rows))
                fewest += [rows] if "test" in found else []
    titles = {part: title.partition(",")[0] for part, _, title in FIGURES}
    told = []
    for part, some in counts.items():
        each = [(f"{train} rows to train the probe and " if train else "") + f"{rows} to test" for train, rows in some]
        told.append(f"{titles[part]}: {', or '.join(sorted(each))}")
    error = f" The standard error of an accuracy is {50 / min(fewest) ** 0.5:.1f} points at most." if fewest else ""
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
    chosen = FIGURES[2:] if of_pictures(quality) else FIGURES[:2]
    return tuple(parts.get(part, {}).get(key) for part, key, _ in chosen)


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
    """Five lines with the measured figures; what was not measured is said."""
    base = scores(quality, "base")[0]

    def loss(name: str) -> float | None:
        found = scores(quality, name)[0]
        return None if found is None or base is None else found - base

    def figures(name: str) -> str:
        times, points = _median(speed, name), loss(name)
        told = NOT_YET if points is None else f"{points:+.2f} points of STS-B"
        return f"{'speed ' + NOT_YET if times is None else f'{times:.2f}×'}, {told}"

    def best(*prefixes: str, within: float = 1.0) -> str | None:
        """The fastest that loses a point at most, or else the one that loses least."""
        named = {name: loss(name) for name in quality["contenders"] if name.startswith(prefixes)}
        kept = {name: points for name, points in named.items() if points is not None}
        close = [name for name, points in kept.items() if points >= -within]
        if close:
            return max(close, key=lambda name: (_median(speed, name) or 0, kept[name]))
        return max(kept, key=lambda name: kept[name]) if kept else None

    def told(*prefixes: str) -> str:
        name = best(*prefixes)
        return f"{name} ({figures(name)})" if name else f"{prefixes[0]} ({NOT_YET})"

    def on_top(form: str) -> str:
        """The fastest plugin on a base in another number format, beside that base alone."""
        rows = [name for name in quality["contenders"] if name.startswith(f"{form} + plugin")]
        timed = [name for name in rows if _median(speed, name) is not None and loss(name) is not None]
        alone, under = _median(speed, form), loss(form)
        if not timed or alone is None or under is None:
            return f"of {form}: speed {NOT_YET}"
        name = max(timed, key=lambda each: _median(speed, each) or 0)
        times, points = (_median(speed, name) or 0) / alone, (loss(name) or 0) - under
        verdict = "" if times > 1 else ", which gains nothing"
        return f"of {form}: {name} is {times:.2f} times as fast as {form} alone, {points:+.2f} points{verdict}"

    close = [
        (times, name)
        for name in quality["contenders"]
        if (times := _median(speed, name)) is not None and (points := loss(name)) is not None and points >= -1
    ]
    winner = f"{max(close)[1]} ({figures(max(close)[1])})" if close and speed.get("rows") else NOT_YET
    return [
        f"Nothing to be trained, one line: bf16 ({figures('bf16')}), where the processor multiplies in it; "
        f"int8 ({figures('int8')}).",
        f"A plugin, trained once, on top {on_top('bf16')}; {on_top('int8')}.",
        f"float32 has to stay: {told('plugin')}, whose k changes by load; without training {told('token merging')}.",
        f"Another runtime is no problem: {told('ONNX Runtime')}; another model is none: {told('next-smaller')}.",
        f"The fastest of all within one point of the base: {winner}.",
    ]


def equally_fast(quality: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """Each plugin beside the merging of patches closest to its speed, or to its FLOPs until that is timed."""

    def cost(name: str) -> float | None:
        share = flops_share(quality, name)
        return _median(speed, name) if speed.get("rows") else 1 / share if share else None

    def told(name: str) -> str:
        share = flops_share(quality, name)
        how = f"{cost(name):.2f}×" if speed.get("rows") else f"{share:.0%} of the FLOPs"
        return f"{name} ({how}, {scores(quality, name)[0]:.2f} %)"

    def known(prefix: str) -> list[str]:
        names = [name for name in quality["contenders"] if name.startswith(prefix)]
        return [name for name in names if cost(name) is not None and scores(quality, name)[0] is not None]

    merged, lines = known("patch merging"), []
    for name in known("plugin") if merged else ():
        pace, own = cost(name) or 0, scores(quality, name)[0] or 0
        peer = min(merged, key=lambda each: abs((cost(each) or 0) - pace))
        ahead = own - (scores(quality, peer)[0] or 0)
        better = "the plugin" if ahead >= 0 else "merging patches"
        verdict = f"{better} keeps {abs(ahead):.2f} points more"
        lines.append(f"{told(name)} beside {told(peer)}: {verdict}.")
    return lines or [f"A plugin beside the merging of patches at equal speed: {NOT_YET}."]


def plot(quality: dict[str, Any], speed: dict[str, Any], path: Path, name: str) -> None:
    """Speed against the first figure, with the line of those that no other beats in both."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = name
    from matplotlib import pyplot as plt

    row, unit = speed["rows"][0], "pixels a side" if of_pictures(quality) else "tokens"
    figure_title = FIGURES[2 if of_pictures(quality) else 0][2]
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
        p for p in points.values() if not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points.values())
    )
    axes.plot(*zip(*front, strict=True), color="0.8", linewidth=6, zorder=0, label="none is better in both")
    base = points["base"][1]
    lowest = min(score for _, score in points.values())
    if lowest < base - MUCH:
        axes.set_ylim(base - MUCH, max(score for _, score in points.values()) + 0.3)
    for number, (family, settings) in enumerate(families.items()):
        hidden = [f"{setting}: {score:.1f}" for setting, (_, score) in settings.items() if score < base - MUCH]
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
        ylabel=figure_title,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
