"""The page and the picture of the peers, made of the JSON that `run.py` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_variator.files import replacing, write_text
from peft_variator.markdown import make_table, replace_between


__all__ = ["advice", "table", "trained_alike", "write_page"]

NOT_YET = "not measured yet"


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
        body.append(
            "### Which should I use?\n\n" + "\n".join(f"{n}. {s}" for n, s in enumerate(advice(quality, speed), 1))
        )
    page = docs / "peers.md"
    write_text(page, replace_between(page.read_text(encoding="utf-8"), "peers", "\n\n".join(body)))


def table(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """One row a contender: quality, and how many times as fast as the base it is at each shape."""
    names = list(quality["contenders"])
    shapes = [(row["batch"], row["length"]) for row in speed.get("rows", [])]
    head = ["", "STS-B, Spearman × 100", "SST-2, accuracy %", *[f"{b}×{n}, times as fast" for b, n in shapes]]
    rows = []
    for name in names:
        missing = quality["contenders"][name].get("missing")
        cells = [f"{value:.2f}" if value is not None else "–" for value in scores(quality, name)]
        times = [_times(row, name) for row in speed.get("rows", [])]
        rows.append([f"{name} ({missing})" if missing else name, *cells, *times])
    return make_table(head, rows)


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


def scores(quality: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    """STS-B and SST-2 of a contender; `None`: not measured."""
    parts = quality["contenders"].get(name, {}).get("parts", {})
    return parts.get("stsb", {}).get("spearman"), parts.get("sst2", {}).get("accuracy")


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

    def figures(name: str) -> str:
        found, times, base = scores(quality, name)[0], _median(speed, name), scores(quality, "base")[0]
        loss = NOT_YET if found is None or base is None else f"{found - base:+.2f} points of STS-B"
        return f"{'speed ' + NOT_YET if times is None else f'{times:.2f}×'}, {loss}"

    def best(prefix: str) -> str:
        names = [name for name in quality["contenders"] if name.startswith(prefix)]
        named = [name for name in names if "parts" in quality["contenders"][name]]
        if not named:
            return f"{prefix} ({NOT_YET})"
        chosen = max(named, key=lambda name: (_median(speed, name) or 0, scores(quality, name)[0] or 0))
        return f"{chosen} ({figures(chosen)})"

    base = scores(quality, "base")[0]
    close = [
        (times, name)
        for name in quality["contenders"]
        if (times := _median(speed, name)) is not None
        and base is not None
        and (found := scores(quality, name)[0]) is not None
        and found >= base - 1
    ]
    winner = f"{max(close)[1]} ({figures(max(close)[1])})" if close and speed.get("rows") else NOT_YET
    return [
        f"Nothing to be trained, one line: int8 ({figures('int8')}).",
        f"More than int8 gives, with a plugin trained once: {best('int8 + plugin')}.",
        f"Floating point has to stay, or k has to change by load: {best('plugin')}; without training "
        f"{best('token merging')}.",
        f"Another runtime is no problem: {best('ONNX Runtime')}; another model is none: {best('next-smaller')}.",
        f"The fastest of all within one point of the base: {winner}.",
    ]


def plot(quality: dict[str, Any], speed: dict[str, Any], path: Path, name: str) -> None:
    """Speed against STS-B, with the line of those that no other beats in both."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = name
    from matplotlib import pyplot as plt

    row = speed["rows"][0]
    points = {}
    for contender in quality["contenders"]:
        times, score = _median(speed, contender), scores(quality, contender)[0]
        if times is not None and score is not None:
            points[contender] = (times, score)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    front = sorted(
        p for p in points.values() if not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points.values())
    )
    axes.plot(*zip(*front, strict=True), color="0.75", zorder=0)
    for contender, (times, score) in points.items():
        axes.scatter(times, score, color="tab:orange" if "plugin" in contender else "tab:blue")
        axes.annotate(contender, (times, score), xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(
        title=f"{name}, {row['batch']}×{row['length']} tokens: up and to the right is better",
        xlabel="times as fast as the base",
        ylabel="STS-B test, Spearman × 100",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
