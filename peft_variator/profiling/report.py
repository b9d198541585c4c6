"""The figures of one benchmark run, and their JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_text
from .timing import Spread, speedup


__all__ = ["BenchmarkReport", "Measurement"]

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

    @property
    def title(self) -> str:
        """What was measured, in a few words: `bert-base, encoder, 8×128, float32`."""
        batch, length = self.settings["batch"], self.settings["length"]
        shape = f"{batch} images" if length is None else f"{batch}×{length}"
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

    def summary(self, plugin: Measurement) -> dict[str, Any]:
        """The derived figures of one ratio, by name."""
        ideal, unpacked, measured = self.ideal_speedup(plugin), self.unpacked_speedup(plugin), self.speedup(plugin)
        return {
            "flops_saved": self.flops_saved(plugin),
            "ideal_speedup": ideal,
            "speedup": asdict(measured),
            "measured_over_ideal": measured.median / ideal,
            "ideal_speedup_unpacked": unpacked,
            "measured_over_ideal_unpacked": None if unpacked is None else measured.median / unpacked,
        }

    def save(self, path: str | Path) -> None:
        """Write samples and derived figures as JSON, whole or not at all."""
        content = {"format": FORMAT, **asdict(self)}
        content["summary"] = {plugin.name: self.summary(plugin) for plugin in self.plugins}
        write_text(path, json.dumps(content, indent=2) + "\n")

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
