"""The table of where the time of a call goes, from what parts.py wrote."""

from __future__ import annotations

import statistics
from typing import Any

from peft_variator.markdown import make_table
from peft_variator.profiling import Spread, speedup


__all__ = ["parts_table"]

HEADER = [
    "model",
    "input",
    "k",
    "networks, ms",
    "with plugin, ms",
    "fewer vectors",
    "faster",
    "the plugin itself, ms",
    "everything else, ms",
    "with plugin, ms",
    "whole call, faster",
    "ideal",
]


def parts_table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a row a case, then the commands.

    Args:
        cases: contents of the files.
    """
    if not cases:
        return "No results are committed yet."
    table = make_table(HEADER, map(_row, cases), text_columns=2)
    commands = "\n".join(["```sh", *(case["command"] for case in cases), "```"])
    return f"{table}\n\n{commands}"


def _row(case: dict[str, Any]) -> list[str]:
    base, plugin = case["rounds"]["base"], case["rounds"]["plugin"]
    uneven = " uneven" if case["lengths"] == "uneven" else ""

    def milliseconds(rounds: list[dict[str, Any]], part: str) -> str:
        return f"{1000 * statistics.median(one[part] for one in rounds):.0f}"

    def faster(part: str) -> str:
        return _spread(speedup([one[part] for one in base], [one[part] for one in plugin]))

    return [
        case["model"],
        f"{case['batch']}×{case['length']}{uneven}",
        str(case["ratio"]),
        milliseconds(base, "networks"),
        milliseconds(plugin, "networks"),
        f"{base[0]['vectors'] / plugin[0]['vectors']:.2f}×",
        faster("networks"),
        milliseconds(plugin, "plugin"),
        milliseconds(base, "rest"),
        milliseconds(plugin, "rest"),
        faster("total"),
        f"{case['flops']['base'] / case['flops']['plugin']:.2f}×",
    ]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f}× [{spread.low:.2f}–{spread.high:.2f}]"
