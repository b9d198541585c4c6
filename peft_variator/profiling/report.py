"""The figures of one benchmark run: their JSON, their table for the terminal, their picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from ..files import replacing, write_text
from .timing import Spread, speedup


__all__ = ["BenchmarkReport", "Measurement", "check_plotting", "make_table", "save_plot"]

FORMAT = 1


@dataclass(frozen=True)
class Measurement:
    """What was measured of one candidate.

    Args:
        name: `"base"`, `"k = 4"`, `"plugin off"`.
        flops: floating-point operations of one call.
        flops_unpacked: the same if padding were computed like real tokens; `None` where there is no padding.
        peak_memory: bytes held at the peak beyond weights and inputs.
        seconds: seconds a call, one sample a round.
    """

    name: str
    flops: int
    flops_unpacked: int | None
    peak_memory: int
    seconds: list[float]


@dataclass(frozen=True)
class BenchmarkReport:
    """A base and a plugin at several ratios, measured alternately in one run.

    Args:
        model: what was measured.
        settings: batch, length, dtype and the like, as JSON values.
        environment: machine and versions.
        command: what was typed.
        base_parameters: parameters of the base, unpacked.
        added_parameters: parameters of the plugin.
        base: the base.
        plugins: the plugin, one entry a ratio.
        packed_layers: name of every packed 2:4 layer of the base -> the product that it runs, and why.
        float_corrections: names of the plugin's layers whose correction runs in floating point on a network that is
            quantised.
    """

    model: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    command: str
    base_parameters: int
    added_parameters: int
    base: Measurement
    plugins: list[Measurement]
    packed_layers: dict[str, str] = field(default_factory=dict)
    float_corrections: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What was measured, in a few words: `bert-base, encoder, 8×128, float32`."""
        batch, length = self.settings["batch"], self.settings["length"]
        inputs = "images" if self.settings["task"] == "vision" else "recordings"
        shape = f"{batch} {inputs}" if length is None else f"{batch}×{length}"
        uneven = " with uneven lengths" if self.settings["lengths"] == "uneven" else ""
        return f"{self.model}, {self.settings['task']}, {shape}{uneven}, {self.settings['dtype']}"

    @property
    def machine(self) -> str:
        """What it was measured on, in a few words: `AMD EPYC, threads: 2`, or the name of the GPU."""
        environment = self.environment
        return environment.get("gpu") or f"{environment['cpu']}, threads: {environment['threads']}"

    def flops_saved(self, plugin: Measurement) -> float:
        """Share of the base's FLOPs that the plugin does not do, e.g. 0.49."""
        return 1 - plugin.flops / self.base.flops

    def ideal_speedup(self, plugin: Measurement) -> float:
        """How many times fewer FLOPs the plugin does than the base: the speed-up if time were FLOPs."""
        return self.base.flops / plugin.flops

    def unpacked_speedup(self, plugin: Measurement) -> float | None:
        """The ideal speed-up of a plugin that computes padding like the base; `None` where there is no padding."""
        return None if plugin.flops_unpacked is None else self.base.flops / plugin.flops_unpacked

    def speedup(self, plugin: Measurement) -> Spread:
        """How many times faster than the base: median and quartiles over the rounds."""
        return speedup(self.base.seconds, plugin.seconds)

    def pays(self, plugin: Measurement) -> bool:
        """Whether the plugin was faster than the base, by the median over the rounds."""
        return self.speedup(plugin).median > 1

    def summary(self, plugin: Measurement) -> dict[str, Any]:
        """The derived figures of one ratio, by name."""
        ideal, unpacked, measured = self.ideal_speedup(plugin), self.unpacked_speedup(plugin), self.speedup(plugin)
        return {
            "flops_saved": self.flops_saved(plugin),
            "ideal_speedup": ideal,
            "speedup": asdict(measured),
            "pays": self.pays(plugin),
            "measured_over_ideal": measured.median / ideal,
            "ideal_speedup_unpacked": unpacked,
            "measured_over_ideal_unpacked": None if unpacked is None else measured.median / unpacked,
        }

    def to_json(self) -> str:
        """Samples and derived figures as JSON text."""
        content = {"format": FORMAT, **asdict(self)}
        content["summary"] = {plugin.name: self.summary(plugin) for plugin in self.plugins}
        return json.dumps(content, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write what `to_json` gives, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> BenchmarkReport:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no benchmark report of this format.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(
                f"{path} is no benchmark report of format {FORMAT}. Write it with `peft-variator bench --json`."
            )
        del content["summary"]
        content["base"] = Measurement(**content["base"])
        content["plugins"] = [Measurement(**plugin) for plugin in content["plugins"]]
        return cls(**content)


def make_table(report: BenchmarkReport) -> Table:
    """One row for the base and one a ratio; a batch with padding has two more columns."""
    padded = report.base.flops_unpacked is not None
    table = Table(
        title=escape(report.title), caption=_caption(report, padded), caption_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    headers = ["FLOPs\nsaved", "ideal\nspeed-up", "measured\nspeed-up", "measured\n/ ideal"]
    headers += ["ideal,\npads\ncomputed", "measured\n/ that"] if padded else []
    headers += ["ms", "peak\nmemory", "added\nparams"]
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    table.add_row("base", *[""] * (len(headers) - 3), *_cost(report.base), "")
    for plugin in report.plugins:
        table.add_row(plugin.name, *_gains(report, plugin), *_cost(plugin), f"{report.added_parameters:,}")
    return table


def _caption(report: BenchmarkReport, padded: bool) -> str:
    lines = [
        f"{report.machine}; torch {report.environment['torch']}.",
        f"Medians of {report.settings['rounds']} rounds, quartiles below them.",
        f"Base: {report.base.flops / 1e9:,.2f} GFLOPs, {report.base_parameters:,} parameters.",
        "Ideal: the base's FLOPs over the plugin's. Peak: memory held beyond weights and inputs.",
    ]
    if padded:
        lines.append("Pads computed: the ideal of a plugin that, like the base, spends FLOPs on padding.")
    return "\n".join(lines)


def _gains(report: BenchmarkReport, plugin: Measurement) -> list[str]:
    measured, ideal, unpacked = report.speedup(plugin), report.ideal_speedup(plugin), report.unpacked_speedup(plugin)
    cells = [
        f"{report.flops_saved(plugin):.1%}",
        f"{ideal:.2f}×",
        _spread(measured, "×"),
        f"{measured.median / ideal:.2f}",
    ]
    return cells if unpacked is None else [*cells, f"{unpacked:.2f}×", f"{measured.median / unpacked:.2f}"]


def _cost(measurement: Measurement) -> list[str]:
    milliseconds = Spread.of([1000 * seconds for seconds in measurement.seconds])
    return [_spread(milliseconds), decimal(measurement.peak_memory)]


def _spread(spread: Spread, unit: str = "") -> str:
    digits = 2 if spread.median < 100 else 0
    return f"{spread.median:.{digits}f}{unit}\n{spread.low:.{digits}f}–{spread.high:.{digits}f}"


def check_plotting() -> None:
    """Raise if matplotlib is missing; call it before measuring, not after.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("A plot needs matplotlib, which is not installed. Run: pip install 'peft-variator[plots]'")


def save_plot(report: BenchmarkReport, path: str | Path) -> None:
    """Bars of the ideal and the measured speed-up of each ratio, with quartiles, as PNG; written whole or not at all.

    Args:
        report: the figures.
        path: where the picture goes; matplotlib reads the format off its ending.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib.figure import Figure

    measured = [report.speedup(plugin) for plugin in report.plugins]
    medians = [spread.median for spread in measured]
    places = range(len(measured))
    figure = Figure(figsize=(1.6 + 1.4 * len(measured), 3.6), layout="constrained")
    axes = figure.subplots()
    ideal = [report.ideal_speedup(plugin) for plugin in report.plugins]
    axes.bar([place - 0.2 for place in places], ideal, 0.4, label="ideal (FLOPs)", color="#c6d4e1")
    spreads = [[s.median - s.low for s in measured], [s.high - s.median for s in measured]]
    axes.bar(
        [place + 0.2 for place in places], medians, 0.4, yerr=spreads, capsize=3, label="measured", color="#2f6690"
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(list(places), [plugin.name for plugin in report.plugins])
    axes.set_ylabel("times faster than the base")
    axes.set_title(f"{report.title}\n{report.machine}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
