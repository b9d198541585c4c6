"""Metrics as modules of the `evaluate` library, read from this package: no network, no extra dependency.

Each folder `NAME/NAME.py` beside this file is one metric. `evaluate.load(path("fidelity"))` and `load("fidelity")` are
the same; `evaluate.combine` takes the paths too. `evaluate` brings datasets, pandas and pyarrow with it and is
imported when a metric is first loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import evaluate


__all__ = ["load", "names", "path"]

_ROOT = Path(__file__).resolve().parent

# Standard metrics that version 0.1 had modules of, and the calls that compute them: name -> call.
_REMOVED = {
    "accuracy": "sklearn.metrics.accuracy_score(references, predictions)",
    "f1": "sklearn.metrics.f1_score(references, predictions)",
    "matthews_correlation": "sklearn.metrics.matthews_corrcoef(references, predictions)",
    "pearsonr": "scipy.stats.pearsonr(predictions, references).statistic",
    "spearmanr": "scipy.stats.spearmanr(predictions, references).statistic",
    "squad": 'evaluate.load("squad").compute(predictions=predictions, references=references)',
}


def names() -> list[str]:
    """Names of the metrics in this package, sorted."""
    return sorted(script.stem for script in _ROOT.glob("*/*.py") if script.stem == script.parent.name)


def path(name: str) -> str:
    """Folder of the metric `name`, in the form that `evaluate.load` and `evaluate.combine` take.

    Args:
        name: one of `names()`.

    Raises:
        ValueError: there is no metric of this name; of one that version 0.1 had, the message gives the call to use.
    """
    if name in _REMOVED:
        raise ValueError(f"The metric {name!r} is no longer part of peft_variator.metrics. Use {_REMOVED[name]}.")
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
        ValueError: there is no metric of this name; of one that version 0.1 had, the message gives the call to use.
    """
    folder = path(name)
    import evaluate

    return evaluate.load(folder, **kwargs)
