"""The scores of the tasks: scikit-learn's and SciPy's, and the exact match and F1 of SQuAD v1.1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score


__all__ = ["SCORES", "squad_exact_match", "squad_f1"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)

# Name -> function of predictions and references, one a row, that gives a score from 0 (or −1) to 1.
SCORES: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "accuracy": lambda predictions, references: float(accuracy_score(references, predictions)),
    "spearmanr": lambda predictions, references: float(spearmanr(predictions, references).statistic),
}


def squad_exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions equal to one of their answers after normalisation, 0 to 1.

    Args:
        predictions: one answer a question.
        references: the answers that people gave, at least one a question.

    Raises:
        ValueError: there is no question, a question has no answer, or the two differ in length.
    """
    return _mean_best(_exact, predictions, references)


def squad_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over questions of the best F1 of words against one of the answers, 0 to 1.

    Args:
        predictions: one answer a question.
        references: the answers that people gave, at least one a question.

    Raises:
        ValueError: there is no question, a question has no answer, or the two differ in length.
    """
    return _mean_best(_f1, predictions, references)


def _mean_best(
    measure: Callable[[list[str], list[str]], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    if not predictions:
        raise ValueError("predictions is empty: a score needs at least one question.")
    unanswered = [number for number, answers in enumerate(references) if not answers]
    if unanswered:
        raise ValueError(f"Question {unanswered[0]} has no answer; every question of SQuAD v1.1 has one.")
    best = [
        max(measure(_words(prediction), _words(answer)) for answer in answers)
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return sum(best) / len(best)


def _words(text: str) -> list[str]:
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
