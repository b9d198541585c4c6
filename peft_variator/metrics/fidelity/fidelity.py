"""How closely a compressed model follows its base, as a module of the `evaluate` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from peft_variator.metrics.common import as_rows, pair_info


__all__ = ["Fidelity"]

_INPUTS = """
Args:
    predictions: rows of the compressed model, shape (rows, features): hidden states of real tokens, embeddings, or
        logits. Leave padding out.
    references: the same rows of the base.
Configurations, chosen with `evaluate.load(path, config_name)`:
    "hidden": cosine and relative_error; "logits": agreement and kl; "default": all four, of which agreement and kl
    mean something only where the rows are logits.
Returns:
    cosine: mean over rows of the cosine similarity, −1 to 1.
    relative_error: ‖predictions − references‖ / ‖references‖, Frobenius norms over all rows; 0 is equal.
    agreement: share of rows whose largest entry is at the same place, 0 to 1.
    kl: mean over rows of KL(softmax(references) ‖ softmax(predictions)), in nats.
"""


def _hidden(predicted: np.ndarray, base: np.ndarray) -> dict[str, float]:
    norms = [_norms(predicted, "predictions"), _norms(base, "references")]
    cosines = np.sum(predicted * base, axis=1) / (norms[0] * norms[1])
    error = np.linalg.norm(predicted - base) / np.linalg.norm(base)
    return {"cosine": float(cosines.mean()), "relative_error": float(error)}


def _norms(rows: np.ndarray, name: str) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)
    if not norms.all():
        raise ValueError(
            f"Row {int(np.argmin(norms))} of {name} is all zeros, so its cosine is not defined. Leave padding out."
        )
    return norms


def _logits(predicted: np.ndarray, base: np.ndarray) -> dict[str, float]:
    agreement = predicted.argmax(axis=1) == base.argmax(axis=1)
    log_p, log_q = _log_softmax(base), _log_softmax(predicted)
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return {"agreement": float(agreement.mean()), "kl": float(divergence.mean())}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


_CONFIGURATIONS = {"hidden": [_hidden], "logits": [_logits], "default": [_hidden, _logits]}


class Fidelity(evaluate.Metric):
    """How closely the rows of a compressed model follow those of its base."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _CONFIGURATIONS:
            raise ValueError(
                f"fidelity has no configuration {self.config_name!r}; choose one of: {', '.join(_CONFIGURATIONS)}."
            )
        return pair_info(type(self).__doc__, _INPUTS, datasets.Sequence(datasets.Value("float32")))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, base = as_rows(predictions, "predictions"), as_rows(references, "references")
        if predicted.shape != base.shape:
            raise ValueError(f"predictions are {predicted.shape} and references {base.shape}; they must be alike.")
        results: dict[str, float] = {}
        for measure in _CONFIGURATIONS[self.config_name]:
            results |= measure(predicted, base)
        return results
