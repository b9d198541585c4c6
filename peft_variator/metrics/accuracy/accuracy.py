"""Accuracy of predicted class ids, as a module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from peft_variator.metrics.common import as_labels, pair_info


__all__ = ["Accuracy"]

_INPUTS = """
Args:
    predictions: predicted class ids.
    references: true class ids.
Returns:
    accuracy: share of predictions equal to their reference, 0 to 1.
"""


class Accuracy(evaluate.Metric):
    """Share of predictions equal to their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return pair_info(type(self).__doc__, _INPUTS, datasets.Value("float64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        hits = as_labels(predictions, "predictions") == as_labels(references, "references")
        return {"accuracy": float(hits.mean())}
