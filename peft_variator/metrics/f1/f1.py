"""F1 of predicted class ids, as a module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from peft_variator.metrics.common import as_labels, pair_info


__all__ = ["F1"]

_INPUTS = """
Args:
    predictions: predicted class ids.
    references: true class ids.
    average: "binary" (F1 of `pos_label` alone, as GLUE reports it) or "macro" (mean over all labels that occur).
    pos_label: the positive label of "binary".
Returns:
    f1: 2·TP / (2·TP + FP + FN), 0 to 1; 0 for a label that is never predicted and never true.
"""


def _f1(predicted: np.ndarray, true: np.ndarray, label: int) -> float:
    """F1 of one `label`; `predicted` and `true` are class ids of shape (examples,)."""
    hits = np.sum((predicted == label) & (true == label))
    total = np.sum(predicted == label) + np.sum(true == label)
    return float(2 * hits / total) if total else 0.0


class F1(evaluate.Metric):
    """Harmonic mean of precision and recall."""

    def _info(self) -> evaluate.MetricInfo:
        return pair_info(type(self).__doc__, _INPUTS, datasets.Value("float64"))

    def _compute(
        self, predictions: Any, references: Any, average: str = "binary", pos_label: int = 1
    ) -> dict[str, float]:
        predicted, true = as_labels(predictions, "predictions"), as_labels(references, "references")
        labels = np.union1d(predicted, true).tolist()
        if average == "macro":
            return {"f1": float(np.mean([_f1(predicted, true, label) for label in labels]))}
        if average != "binary":
            raise ValueError(f'average is {average!r}; choose "binary" or "macro".')
        if len(set(labels) | {pos_label}) > 2:
            raise ValueError(
                f"The labels {labels} with pos_label={pos_label} are not a binary problem. "
                'Pass the pos_label that occurs, or average="macro".'
            )
        return {"f1": _f1(predicted, true, pos_label)}
