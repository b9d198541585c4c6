"""Accuracy, F1, Matthews, Pearson and Spearman against scikit-learn and SciPy."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_variator import metrics


@pytest.fixture(scope="module")
def load():
    """One instance a metric: loading takes longer than computing."""
    loaded = {name: metrics.load(name, keep_in_memory=True) for name in metrics.names()}
    return lambda name, **inputs: loaded[name].compute(**inputs)


def pairs(elements):
    return st.lists(st.tuples(elements, elements), min_size=2, max_size=40).map(
        lambda rows: list(zip(*rows, strict=True))
    )


@settings(deadline=None, max_examples=25)
@given(pair=pairs(st.integers(0, 3)))
def test_labels_of_several_classes(load, pair):
    predictions, references = pair
    inputs = {"predictions": predictions, "references": references}
    assert load("accuracy", **inputs)["accuracy"] == pytest.approx(
        sklearn.metrics.accuracy_score(references, predictions)
    )
    expected = sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)
    assert load("f1", average="macro", **inputs)["f1"] == pytest.approx(expected)
    expected = sklearn.metrics.matthews_corrcoef(references, predictions)
    assert load("matthews_correlation", **inputs)["matthews_correlation"] == pytest.approx(expected)


@settings(deadline=None, max_examples=25)
@given(pair=pairs(st.integers(0, 1)), positive=st.integers(0, 1))
def test_binary_f1(load, pair, positive):
    predictions, references = pair
    expected = sklearn.metrics.f1_score(
        [reference == positive for reference in references],
        [prediction == positive for prediction in predictions],
        zero_division=0,
    )
    found = load("f1", predictions=predictions, references=references, pos_label=positive)
    assert found["f1"] == pytest.approx(expected)


@settings(deadline=None, max_examples=25)
@given(pair=pairs(st.integers(-5, 5).map(lambda value: value / 4)))
def test_correlations_with_ties(load, pair):
    predictions, references = pair
    for name, reference in {"pearsonr": scipy.stats.pearsonr, "spearmanr": scipy.stats.spearmanr}.items():
        found = load(name, predictions=predictions, references=references)[name]
        if len(set(predictions)) == 1 or len(set(references)) == 1:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(reference(predictions, references)[0], abs=1e-9)


def test_matthews_on_many_examples_does_not_overflow(load):
    references = np.arange(100_000) % 2
    found = load("matthews_correlation", predictions=1 - references, references=references)
    assert found == {"matthews_correlation": -1.0}


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lists_arrays_and_tensors(load, kind):
    inputs = {"predictions": kind([1, 0, 1, 1]), "references": kind([1, 0, 0, 1])}
    assert load("accuracy", **inputs) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation"])
def test_probabilities_are_not_class_ids(load, name):
    with pytest.raises(ValueError, match=r"predictions\[1\] is 0.7, which is not a class id. Pass whole numbers"):
        load(name, predictions=[1, 0.7], references=[1, 1])


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation", "pearsonr", "spearmanr"])
def test_empty_and_not_finite(load, name):
    with pytest.raises(ValueError, match="predictions is empty"):
        load(name, predictions=[], references=[])
    with pytest.raises(ValueError, match=r"references\[0\] is inf; every value must be finite"):
        load(name, predictions=[1.0], references=[math.inf])


def test_f1_of_a_label_that_never_occurs(load):
    assert load("f1", predictions=[0, 0], references=[0, 0]) == {"f1": 0}


def test_f1_refuses_what_is_not_binary(load):
    with pytest.raises(ValueError, match=r"\[0, 1, 2\] with pos_label=1 are not a binary problem"):
        load("f1", predictions=[0, 1], references=[2, 1])
    with pytest.raises(ValueError, match=r"\[2, 3\] with pos_label=1 are not a binary problem"):
        load("f1", predictions=[2, 3], references=[2, 2])
    with pytest.raises(ValueError, match='average is \'micro\'; choose "binary" or "macro"'):
        load("f1", predictions=[0], references=[1], average="micro")
