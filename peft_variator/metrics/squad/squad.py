"""Exact match and F1 of SQuAD v1.1, as a module of the `evaluate` library."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import datasets
import evaluate


__all__ = ["Squad"]

_INPUTS = """
Args:
    predictions: one {"id": str, "prediction_text": str} a question.
    references: one {"id": str, "answers": {"text": [str, …], "answer_start": [int, …]}} a question, in the same order.
Returns:
    exact_match: share of predictions equal to one of their answers after normalisation, in percent.
    f1: mean over questions of the best F1 of words against one of the answers, in percent.
"""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalise(text: str) -> list[str]:
    """Words of an answer, lower-cased, without punctuation and articles (Rajpurkar et al., 2016, section 6.1)."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _exact(prediction: list[str], answer: list[str]) -> float:
    return float(prediction == answer)


def _f1(prediction: list[str], answer: list[str]) -> float:
    """F1 of the two bags of words; two empty bags are equal."""
    if not prediction or not answer:
        return _exact(prediction, answer)
    shared = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * shared / (len(prediction) + len(answer))


class Squad(evaluate.Metric):
    """Exact match and F1 of answers to the questions of SQuAD v1.1 (Rajpurkar et al., 2016, arXiv 1606.05250)."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        answers = datasets.Features(
            {"text": datasets.Sequence(text), "answer_start": datasets.Sequence(datasets.Value("int32"))}
        )
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": dict(answers)},
                }
            ),
        )

    def _compute(
        self, predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]
    ) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        if not pairs:
            raise ValueError("predictions is empty: a metric needs at least one example.")
        return {
            name: 100 * sum(_best(measure, *pair) for pair in pairs) / len(pairs)
            for name, measure in {"exact_match": _exact, "f1": _f1}.items()
        }


def _best(
    measure: Callable[[list[str], list[str]], float], prediction: Mapping[str, Any], reference: Mapping[str, Any]
) -> float:
    """The best value of `measure` over the answers of one question."""
    if prediction["id"] != reference["id"]:
        raise ValueError(
            f"The prediction for {prediction['id']!r} stands beside the reference for {reference['id']!r}. "
            "Sort both in the same order."
        )
    answers = reference["answers"]["text"]
    if not len(answers):
        raise ValueError(f"The question {reference['id']!r} has no answer; every question of SQuAD v1.1 has one.")
    words = _normalise(prediction["prediction_text"])
    return max(measure(words, _normalise(answer)) for answer in answers)
