"""The variance of hidden states, and the sample that it is measured on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from peft_variator.training.loss_terms import HiddenStateVariance
from peft_variator.training.trainer import sample_examples


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99), offset=st.floats(-50, 50))
def test_variance_over_batches_is_that_of_all_tokens(lengths: list[int], seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    variance, tokens = HiddenStateVariance(), [[], []]
    for length in lengths:
        mask = torch.rand(3, length, generator=generator) < 0.7
        mask[0, 0] = True
        layers = [offset + torch.randn(3, length, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
        variance.update(layers, mask)
        for layer, kept in zip(layers, tokens, strict=True):
            kept += layer[mask]
    assume(len(tokens[0]) > 1)
    wanted = [torch.stack(kept).var(0, correction=0).mean() for kept in tokens]
    torch.testing.assert_close(variance.result(), torch.stack(wanted), rtol=1e-9, atol=1e-12)


def test_without_a_mask_all_tokens_count() -> None:
    layers = [torch.randn(2, 5, 3), torch.randn(2, 7, 4)]
    variance = HiddenStateVariance()
    variance.update(layers[:1], None)
    torch.testing.assert_close(variance.result()[0], layers[0].flatten(0, 1).var(0, correction=0).mean())


def test_layers_of_fewer_tokens_have_variances_of_their_own() -> None:
    """As the stages of a hierarchical vision model."""
    batches = [[torch.randn(2, 16, 3), torch.randn(2, 4, 6), torch.randn(2, 1, 12)] for _ in range(3)]
    variance = HiddenStateVariance()
    for layers in batches:
        variance.update(layers, None)
    for layer, found in enumerate(variance.result()):
        tokens = torch.cat([layers[layer] for layers in batches]).flatten(0, 1)
        torch.testing.assert_close(found, tokens.var(0, correction=0).mean())


def test_half_precision_is_summed_in_float32() -> None:
    states = (100 + torch.randn(4, 50, 8)).bfloat16()
    variance = HiddenStateVariance()
    variance.update([states], None)
    assert variance.result().dtype == torch.float32
    torch.testing.assert_close(variance.result()[0], states.float().flatten(0, 1).var(0, correction=0).mean())


def test_a_far_mean_does_not_cost_digits() -> None:
    states = 1e4 + torch.randn(20, 10, 4, generator=torch.Generator().manual_seed(0))
    variance = HiddenStateVariance()
    for batch in states:
        variance.update([batch.unsqueeze(0)], None)
    wanted = states.double().flatten(0, 1).var(0, correction=0).mean()
    assert float(variance.result()[0]) == pytest.approx(float(wanted), rel=1e-3)


def test_errors_say_what_is_wrong() -> None:
    variance = HiddenStateVariance()
    variance.update([torch.ones(2, 3, 4)], torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="held no real token"):
        variance.result()
    variance.update([torch.ones(2, 3, 4)], None)
    with pytest.raises(ValueError, match=r"variances \[0.0\] over 6 tokens"):
        variance.result()
    variance.update([torch.full((2, 3, 4), torch.nan)], None)
    with pytest.raises(ValueError, match=r"variances \[nan\]"):
        variance.result()


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(1000)


class SizedStream(Stream):
    def __len__(self) -> int:
        return 1000


def test_a_sample_is_spread_evenly_or_comes_first() -> None:
    assert sample_examples(list(range(10)), 4) == [0, 2, 5, 7]
    assert sample_examples(list(range(3)), 8) == [0, 1, 2]
    assert sample_examples(Stream(), 3) == [0, 1, 2]
    assert sample_examples(SizedStream(), 3) == [0, 1, 2]
