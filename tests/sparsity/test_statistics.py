"""Sums over a layer's inputs, and how they refuse inputs that say nothing."""

import pytest
import torch

from peft_variator.sparsity.statistics import GramStatistics, InputStatistics


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_batches_equal_those_of_all_rows(dtype):
    rows = (torch.randn(50, 6) * 3 + 2).to(dtype)
    inputs, gram = InputStatistics(6, CPU), GramStatistics(6, CPU)
    for part in rows.split([1, 20, 0, 29]):
        inputs.add(part)
        gram.add(part)
    every = rows.double()
    assert inputs.tokens == gram.tokens == 50
    torch.testing.assert_close(inputs.norm, every.norm(dim=0))
    torch.testing.assert_close(inputs.mean, every.mean(dim=0))
    torch.testing.assert_close(inputs.variance, every.var(dim=0, unbiased=False))
    torch.testing.assert_close(gram.gram.double(), every.T @ every, rtol=1e-5, atol=1e-4)


def test_sums_are_float32_or_better():
    inputs, gram = InputStatistics(4, CPU), GramStatistics(4, CPU)
    inputs.add(torch.ones(1, 4, dtype=torch.bfloat16))
    gram.add(torch.ones(1, 4, dtype=torch.bfloat16))
    assert (inputs.norm.dtype, inputs.variance.dtype, gram.gram.dtype) == (torch.float64, torch.float64, torch.float32)


def test_many_half_precision_tokens_do_not_saturate():
    inputs = InputStatistics(1, CPU)
    for _ in range(3):
        inputs.add(torch.full((40_000, 1), 2.0, dtype=torch.float16))
    assert inputs.norm.item() == pytest.approx((120_000 * 4) ** 0.5)


def test_variance_of_a_large_constant_is_not_negative():
    inputs = InputStatistics(1, CPU)
    inputs.add(torch.full((1000, 1), 1e4 / 3))
    assert 0 <= inputs.variance.item() < 1e-6


@pytest.mark.parametrize("kind", [InputStatistics, GramStatistics])
def test_no_token_is_an_error(kind):
    with pytest.raises(ValueError, match="never reached 'layer.3'.*exclude_modules"):
        kind(4, CPU).check("layer.3")


@pytest.mark.parametrize("kind", [InputStatistics, GramStatistics])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(kind, value):
    statistics = kind(2, CPU)
    statistics.add(torch.tensor([[1.0, value]]))
    with pytest.raises(ValueError, match="inputs of 'layer.3'.*NaN or infinite"):
        statistics.check("layer.3")
