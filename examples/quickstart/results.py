"""The figures of a run of the quickstart, and their JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import Kind
from evaluation import Quality

from peft_variator.files import write_text
from peft_variator.profiling import Measurement, Spread


__all__ = ["Results", "Row"]

FORMAT = 2


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: `"k = 4"`.
        kind: what it is, as `contenders` names it.
        ratio: compression ratio k; `None`: there is no plugin.
        speedup: times faster than the base, quartiles over the rounds.
        flops_saved: share of the base's FLOPs that are not done.
        quality: of the embeddings of held-out text.
        stsb: Spearman's correlation on STS-B in percent; `None`: not measured.
    """

    name: str
    kind: Kind
    ratio: int | None
    speedup: Spread
    flops_saved: float
    quality: Quality
    stsb: float | None


@dataclass(frozen=True)
class Results:
    """What a run measured, and on what.

    Args:
        command: what was typed.
        settings: steps, batch size, seed and the like.
        environment: machine and versions.
        seconds: how long training and the whole run took.
        parameters: of the base, and those that the plugin adds.
        text: how much text was trained on and measured on.
        training_log: step and loss, every few steps.
        rows: the table.
        measurements: of the base and of all that is compared: FLOPs, peak memory and every timed sample.
        stsb: the base's correlation on STS-B in percent; `None`: not measured.
    """

    command: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float]
    parameters: dict[str, int]
    text: dict[str, int]
    training_log: list[dict[str, float]]
    rows: list[Row]
    measurements: list[Measurement]
    stsb: float | None

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, whole or not at all."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no result of the quickstart in this format.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} holds no results of format {FORMAT}. Write them with quickstart.py.")
        content["rows"] = [_row(row) for row in content["rows"]]
        content["measurements"] = [Measurement(**measurement) for measurement in content["measurements"]]
        return cls(**content)


def _row(content: dict[str, Any]) -> Row:
    quality = {**content["quality"], "cosine_spread": Spread(**content["quality"]["cosine_spread"])}
    return Row(**{**content, "speedup": Spread(**content["speedup"]), "quality": Quality(**quality)})
