"""Do embeddings retrieve what the base's embeddings retrieve? A module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from peft_variator.field_types import is_whole
from peft_variator.metrics.common import as_rows, pair_info


__all__ = ["NearestNeighbour"]

_INPUTS = """
Args:
    predictions: embeddings of the compressed model, shape (texts, features).
    references: embeddings of the base for the same texts; they may have another number of features.
    k: how many neighbours of each text are compared (default 1).
Returns:
    agreement: each text's k nearest other texts by cosine similarity are sought in both spaces; the mean share of
        neighbours that both have in common, 0 to 1. Of equally near texts the first one counts.
"""

# Similarities are computed for this many texts at a time: 1024 × 100,000 texts in float64 are 0.8 GB.
_CHUNK = 1024


def _neighbours(rows: np.ndarray, k: int, name: str) -> np.ndarray:
    """The k nearest other rows of each row, nearest first: int64 of shape (rows, k)."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"Row {int(np.argmin(norms))} of {name} is all zeros, so its cosine is not defined.")
    unit = rows / norms
    chunks = []
    for start in range(0, len(unit), _CHUNK):
        similarity = unit[start : start + _CHUNK] @ unit.T
        similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -np.inf
        chunks.append(np.argsort(-similarity, axis=1, kind="stable")[:, :k])
    return np.concatenate(chunks)


class NearestNeighbour(evaluate.Metric):
    """Share of nearest neighbours that two sets of embeddings of the same texts have in common."""

    def _info(self) -> evaluate.MetricInfo:
        return pair_info(type(self).__doc__, _INPUTS, datasets.Sequence(datasets.Value("float32")))

    def _compute(self, predictions: Any, references: Any, k: int = 1) -> dict[str, float]:
        predicted, base = as_rows(predictions, "predictions"), as_rows(references, "references")
        if not is_whole(k) or not 1 <= k < len(base):
            raise ValueError(f"k is {k!r}; with {len(base)} texts it must be an integer from 1 to {len(base) - 1}.")
        found = _neighbours(predicted, k, "predictions")
        wanted = _neighbours(base, k, "references")
        shared = [len(np.intersect1d(*pair)) for pair in zip(found, wanted, strict=True)]
        return {"agreement": float(np.mean(shared) / k)}
