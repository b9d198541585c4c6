"""Fidelity and nearest-neighbour agreement against plain loops."""

import math

import numpy as np
import pytest
import torch

from peft_variator import metrics


@pytest.fixture(scope="module")
def fidelity():
    loaded = {
        name: metrics.load("fidelity", config_name=name, keep_in_memory=True) for name in (None, "hidden", "logits")
    }
    return lambda config_name=None, **inputs: loaded[config_name].compute(**inputs)


@pytest.fixture(scope="module")
def neighbours():
    metric = metrics.load("nearest_neighbour", keep_in_memory=True)
    return lambda predictions, references, **options: metric.compute(
        predictions=predictions, references=references, **options
    )["agreement"]


def make_rows(rows, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, features, generator=generator)
    return base + 0.5 * torch.randn(rows, features, generator=generator), base


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def reference_fidelity(predictions, references):
    """Every figure by a loop over rows and features, in Python floats."""
    cosines, agreements, divergences, error, size = [], [], [], 0.0, 0.0
    for p, r in zip(predictions.tolist(), references.tolist(), strict=True):
        cosines.append(dot(p, r) / math.sqrt(dot(p, p) * dot(r, r)))
        error += sum((a - b) ** 2 for a, b in zip(p, r, strict=True))
        size += dot(r, r)
        agreements.append(p.index(max(p)) == r.index(max(r)))
        p_sum, r_sum = sum(map(math.exp, p)), sum(map(math.exp, r))
        divergences.append(
            sum(
                math.exp(b) / r_sum * math.log(math.exp(b) / r_sum * p_sum / math.exp(a))
                for a, b in zip(p, r, strict=True)
            )
        )
    return {
        "cosine": sum(cosines) / len(cosines),
        "relative_error": math.sqrt(error / size),
        "agreement": sum(agreements) / len(agreements),
        "kl": sum(divergences) / len(divergences),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 5)])
def test_fidelity_equals_the_loop(fidelity, dtype, shape):
    predictions, references = (rows.to(dtype) for rows in make_rows(*shape))
    found = fidelity(predictions=predictions, references=references)
    assert found == pytest.approx(reference_fidelity(predictions, references), rel=1e-5, abs=1e-9)


def test_each_configuration_gives_its_own_figures(fidelity):
    predictions, references = make_rows(9, 4)
    everything = fidelity(predictions=predictions, references=references)
    hidden = fidelity("hidden", predictions=predictions, references=references)
    logits = fidelity("logits", predictions=predictions, references=references)
    assert set(hidden) == {"cosine", "relative_error"}
    assert set(logits) == {"agreement", "kl"}
    assert hidden | logits == everything


def test_a_model_agrees_with_itself(fidelity):
    _, references = make_rows(9, 4)
    found = fidelity(predictions=references, references=references)
    assert found == {"cosine": pytest.approx(1), "relative_error": 0, "agreement": 1, "kl": 0}


def test_large_logits_do_not_overflow(fidelity):
    found = fidelity("logits", predictions=[[1e4, 0.0]], references=[[0.0, 1e4]])
    assert found == {"agreement": 0, "kl": pytest.approx(1e4)}


def test_logits_may_be_zero(fidelity):
    assert fidelity("logits", predictions=[[0.0, 0.0]], references=[[0.0, 0.0]]) == {"agreement": 1, "kl": 0}


def test_bad_rows(fidelity):
    with pytest.raises(ValueError, match=r"lengths found are \[\]"):
        fidelity(predictions=[], references=[])
    with pytest.raises(ValueError, match=r"lengths found are \[1, 2\]"):
        fidelity(predictions=[[1.0, 2.0], [1.0]], references=[[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=r"predictions are \(1, 1\) and references \(1, 2\)"):
        fidelity(predictions=[[1.0]], references=[[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"references\[1, 0\] is nan"):
        fidelity(predictions=[[1.0], [1.0]], references=[[1.0], [math.nan]])
    with pytest.raises(ValueError, match="Row 1 of predictions is all zeros"):
        fidelity(predictions=[[1.0], [0.0]], references=[[1.0], [1.0]])


def test_unknown_configuration():
    with pytest.raises(ValueError, match="no configuration 'tokens'; choose one of: hidden, logits, default"):
        metrics.load("fidelity", config_name="tokens")


def reference_neighbours(rows, k):
    """The k nearest other rows of each row by cosine, by a loop over pairs; ties go to the lower index."""
    found = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        cosine = {j: float(row @ rows[j] / (np.linalg.norm(row) * np.linalg.norm(rows[j]))) for j in others}
        found.append(set(sorted(others, key=lambda j: (-cosine[j], j))[:k]))
    return found


@pytest.mark.parametrize("k", [1, 3, 10])
def test_neighbours_equal_the_loop(neighbours, k):
    predictions, references = (rows.numpy().astype(np.float64) for rows in make_rows(23, 6, seed=k))
    pairs = zip(reference_neighbours(predictions, k), reference_neighbours(references, k), strict=True)
    expected = sum(len(p & r) / k for p, r in pairs) / 23
    assert 0 < expected < 1
    assert neighbours(predictions, references, k=k) == pytest.approx(expected)


def test_neighbours_of_more_texts_than_one_chunk(neighbours):
    """Points on an arc: the only nearest neighbour of one is the next one, across every border of chunks."""
    angles = np.cumsum(np.linspace(1e-3, 5e-4, 1100))
    arc = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert neighbours(arc, arc) == 1
    assert neighbours(arc, arc[::-1]) < 0.01


def test_spaces_of_different_width(neighbours):
    _, references = make_rows(12, 4)
    assert neighbours(torch.cat([references, torch.zeros(12, 3)], dim=1), references, k=2) == 1


@pytest.mark.parametrize("k", [0, 3, -1, 1.5, "2"])
def test_neighbours_that_do_not_exist(neighbours, k):
    with pytest.raises(ValueError, match=f"k is {k!r}; with 3 texts it must be an integer from 1 to 2"):
        neighbours([[1.0], [2.0], [3.0]], [[1.0], [2.0], [3.0]], k=k)


def test_a_number_of_neighbours_of_numpy_will_do(neighbours):
    _, references = make_rows(12, 4)
    assert neighbours(references, references, k=np.int64(2)) == 1


def test_neighbours_of_zero_rows(neighbours):
    with pytest.raises(ValueError, match="Row 0 of references is all zeros"):
        neighbours([[1.0], [2.0]], [[0.0], [2.0]])
