"""The scores of the GLUE example: exact match and F1 of SQuAD on cases worked out by hand, and the tasks' own."""

from pathlib import Path

import pytest


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "glue"


@pytest.fixture(scope="module")
def scores(scripts):
    return scripts("scores")


@pytest.mark.parametrize(
    ("prediction", "answers", "exact_match", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the Denver, broncos!", ["Denver Broncos"], 1, 1),
        ("Broncos", ["Denver Broncos", "Broncos"], 1, 1),
        ("Broncos of Denver", ["Denver Broncos"], 0, 0.8),
        ("yes yes", ["yes no yes yes"], 0, 2 * 2 / 6),
        ("Panthers", ["Denver Broncos"], 0, 0),
        ("theatre", ["the atre"], 0, 0),
        ("", ["Denver"], 0, 0),
        ("the", ["a"], 1, 1),
    ],
)
def test_one_question(scores, prediction, answers, exact_match, f1):
    assert scores.squad_exact_match([prediction], [answers]) == exact_match
    assert scores.squad_f1([prediction], [answers]) == pytest.approx(f1)


def test_questions_are_averaged(scores):
    questions = ["a cat", "dog", "black cat"], [["cat"], ["cat"], ["cat"]]
    assert scores.squad_exact_match(*questions) == pytest.approx(1 / 3)
    assert scores.squad_f1(*questions) == pytest.approx((1 + 2 / 3) / 3)


def test_bad_questions(scores):
    with pytest.raises(ValueError, match="predictions is empty"):
        scores.squad_f1([], [])
    with pytest.raises(ValueError, match="Question 1 has no answer"):
        scores.squad_f1(["cat", "dog"], [["cat"], []])
    with pytest.raises(ValueError, match="shorter|longer"):
        scores.squad_f1(["cat", "dog"], [["cat"]])


def test_every_task_has_a_score_that_tells_right_from_wrong(scores, scripts):
    for task in scripts("tasks").TASKS.values():
        score = scores.SCORES[task.metric]
        assert score([0, 1, 1, 0], [0, 1, 1, 0]) == pytest.approx(1)
        assert score([1, 0, 0, 1], [0, 1, 1, 0]) < 0.5
