"""Exact match and F1 of SQuAD on cases worked out by hand."""

import pytest

from peft_variator import metrics


@pytest.fixture(scope="module")
def squad():
    metric = metrics.load("squad", keep_in_memory=True)

    def compute(*questions):
        """`questions` are pairs (prediction, answers)."""
        predictions = [{"id": str(i), "prediction_text": text} for i, (text, _) in enumerate(questions)]
        references = [
            {"id": str(i), "answers": {"text": answers, "answer_start": [0] * len(answers)}}
            for i, (_, answers) in enumerate(questions)
        ]
        return metric.compute(predictions=predictions, references=references)

    return compute


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 100, 100),
        ("the Denver, broncos!", ["Denver Broncos"], 100, 100),
        ("Broncos", ["Denver Broncos", "Broncos"], 100, 100),
        ("Broncos of Denver", ["Denver Broncos"], 0, 80),
        ("yes yes", ["yes no yes yes"], 0, 100 * 2 * 2 / 6),
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("theatre", ["the atre"], 0, 0),
        ("", ["Denver"], 0, 0),
        ("the", ["a"], 100, 100),
    ],
)
def test_one_question(squad, prediction, answers, exact_match, f1):
    assert squad((prediction, answers)) == {"exact_match": exact_match, "f1": pytest.approx(f1)}


def test_questions_are_averaged(squad):
    found = squad(("a cat", ["cat"]), ("dog", ["cat"]), ("black cat", ["cat"]))
    assert found == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx((100 + 200 / 3) / 3)}


def test_bad_questions(squad):
    with pytest.raises(ValueError, match="predictions is empty"):
        squad()
    with pytest.raises(ValueError, match="question '0' has no answer"):
        squad(("cat", []))
    with pytest.raises(ValueError, match="prediction for 'x' stands beside the reference for 'y'"):
        metrics.load("squad").compute(
            predictions=[{"id": "x", "prediction_text": "cat"}],
            references=[{"id": "y", "answers": {"text": ["cat"], "answer_start": [0]}}],
        )
