"""Metrics as modules of the `evaluate` library, read from this package: no network, no extra dependency.

Each folder `NAME/NAME.py` beside this file is one metric. `evaluate.load(path("fidelity"))` and `load("fidelity")` are
the same; `evaluate.combine([path("accuracy"), path("f1")])` works too. The names and the keys of the results are those
of the modules on the Hub where one of that name exists, so a script can change between them by the path alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import evaluate


__all__ = ["load", "names", "path"]

_ROOT = Path(__file__).resolve().parent


def names() -> list[str]:
    """Names of the metrics in this package, sorted."""
    return sorted(script.stem for script in _ROOT.glob("*/*.py") if script.stem == script.parent.name)


def path(name: str) -> str:
    """Folder of the metric `name`, in the form that `evaluate.load` and `evaluate.combine` take.

    Args:
        name: one of `names()`.

    Raises:
        ValueError: there is no metric of this name.
    """
    if name not in names():
        raise ValueError(f"There is no metric {name!r} in peft_variator.metrics. Choose one of: {', '.join(names())}.")
    return str(_ROOT / name)


def load(name: str, **kwargs: Any) -> evaluate.EvaluationModule:
    """`evaluate.load` on the metric `name` of this package.

    `evaluate` copies the script to its module cache (`HF_MODULES_CACHE`) and imports it from there; nothing is
    fetched.

    Args:
        name: one of `names()`.
        kwargs: handed to `evaluate.load`, e.g. `config_name="logits"` for `fidelity`, or `keep_in_memory=True`.

    Raises:
        ValueError: there is no metric of this name.
    """
    return evaluate.load(path(name), **kwargs)
