"""The pruning methods as functions on tensors, each against a plain reference written apart from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_variator.sparsity.methods.dsnot import dsnot_refine
from peft_variator.sparsity.methods.sparsegpt import inverse_hessian_factor, sparsegpt_prune
from peft_variator.sparsity.patterns import Pattern, apply_mask, keep_largest, meets_pattern, prune_counts, select
from peft_variator.sparsity.statistics import GramStatistics, InputStatistics

from .cases import magnitude_mask, wanda_mask


TARGETS = [0.0, 0.3, 0.5, 0.875, Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def correlated_inputs(width: int, tokens: int = 256, seed: int = 0) -> torch.Tensor:
    """Features that share a few directions, with norms that differ: (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, max(width // 4, 1), generator=generator)
    mixed = shared @ torch.randn(shared.shape[1], width, generator=generator)
    scale = torch.rand(width, generator=generator) * 3 + 0.1
    return (mixed + 0.3 * torch.randn(tokens, width, generator=generator) + 0.2) * scale


def make_layer(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.randn(rows, width, generator=generator), correlated_inputs(width, seed=seed)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[1], torch.device("cpu"))
    statistics.add(inputs)
    return statistics


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    statistics = GramStatistics(inputs.shape[1], torch.device("cpu"))
    statistics.add(inputs)
    return statistics.gram


def lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda index: scores[index])[:count])


def loop_pattern(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    mask = torch.ones_like(scores, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], pattern.group):
            group = scores[row, start : start + pattern.group].tolist()
            for index in lowest(group, pattern.group - pattern.kept):
                mask[row, start + index] = False
    return mask


def loop_rows(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Each row loses its smallest scores; rows lose one more where the shares add up to another whole weight."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    total = math.floor(sparsity * scores.numel() + 0.5)
    before = 0
    for row in range(scores.shape[0]):
        until = (row + 1) * total // scores.shape[0]
        for index in lowest(scores[row].tolist(), until - before):
            mask[row, index] = False
        before = until
    return mask


def loop_matrix(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    for index in lowest(scores.flatten().tolist(), math.floor(sparsity * scores.numel() + 0.5)):
        mask[index] = False
    return mask.view_as(scores)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_equals_plain_loops(target, dtype):
    weight = make_layer(7, 24)[0].to(dtype)
    scores = weight.double().abs()
    expected = loop_pattern(scores, target) if isinstance(target, Pattern) else loop_matrix(scores, target)
    assert torch.equal(magnitude_mask(weight, target), expected)


def test_magnitude_goes_by_size_not_by_value():
    mask = magnitude_mask(torch.tensor([[-5.0, 1.0, 2.0, -3.0]]), 0.5)
    assert mask.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wanda_equals_plain_loops(target, dtype):
    weight, inputs = make_layer(9, 24)
    weight = weight.to(dtype)
    scores = torch.zeros(9, 24, dtype=torch.float64)
    for row in range(9):
        for column in range(24):
            norm = math.sqrt(sum(value * value for value in inputs[:, column].tolist()))
            scores[row, column] = abs(weight[row, column].item()) * norm
    expected = loop_pattern(scores, target) if isinstance(target, Pattern) else loop_rows(scores, target)
    assert torch.equal(wanda_mask(weight, statistics_of(inputs).norm, target), expected)


def loop_sparsegpt(weight, gram, target, damping, block_size):
    """OBS column by column with a freshly inverted Hessian of the columns that are left, in float64."""
    weight, hessian = weight.double().clone(), gram.double().clone()
    rows, width = weight.shape
    original = weight.clone()
    dead = hessian.diagonal() == 0
    for j in range(width):
        hessian[j, j] += 1.0 if dead[j] else 0.0
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    left = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    mask = torch.ones(rows, width, dtype=torch.bool)
    removed = 0
    for j in range(width):
        if isinstance(target, Pattern) and j % target.group == 0:
            group = range(j, j + target.group)
            scores = torch.stack([weight[:, k] ** 2 / left[k][0, 0] for k in group], dim=1)
            mask[:, list(group)] = loop_pattern(scores, target)
        if not isinstance(target, Pattern) and j % block_size == 0:
            block = range(j, min(j + block_size, width))
            scores = torch.stack([weight[:, k] ** 2 / left[k][0, 0] for k in block], dim=1)
            count = math.floor(target * rows * (block[-1] + 1) + 0.5) - removed
            gone = lowest(scores.flatten().tolist(), count)
            for index in gone:
                mask[index // len(block), j + index % len(block)] = False
            removed += count
        error = torch.where(mask[:, j], 0.0, weight[:, j]) / left[j][0, 0]
        weight[:, j:] -= torch.outer(error, left[j][0])
    weight[:, dead] = original[:, dead]
    return mask, torch.where(mask, weight, 0.0)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("block_size", [8, 128])
def test_sparsegpt_equals_plain_obs(target, block_size):
    weight, inputs = make_layer(6, 24, seed=3)
    inputs[:, 5] = 0.0
    expected_mask, expected_weight = loop_sparsegpt(weight, gram_of(inputs), target, 0.01, block_size)
    mask, updated = sparsegpt_prune(weight, gram_of(inputs), target, 0.01, block_size)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated, expected_weight.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("pattern", "block_size", "whole"), [(Pattern(3, 6), 128, 126), (Pattern(1, 3), 8, 6)], ids=str
)
def test_sparsegpt_takes_whole_groups_at_a_time(pattern, block_size, whole):
    weight, inputs = make_layer(4, 252)
    expected_mask, expected_weight = loop_sparsegpt(weight, gram_of(inputs), pattern, 0.01, whole)
    mask, updated = sparsegpt_prune(weight, gram_of(inputs), pattern, 0.01, block_size)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated, expected_weight.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [5, 13, 30])
def test_sparsegpt_takes_any_width(width):
    weight, inputs = make_layer(4, width)
    mask, _ = sparsegpt_prune(weight, gram_of(inputs), 0.5, block_size=8)
    assert (~mask).sum() == math.floor(0.5 * mask.numel() + 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparsegpt_keeps_dtype_and_writes_positive_zeros(dtype):
    weight, inputs = make_layer(6, 24)
    mask, updated = sparsegpt_prune(weight.to(dtype), gram_of(inputs), Pattern(2, 4))
    assert updated.dtype == dtype
    assert torch.equal(updated != 0, mask)
    assert not updated[updated == 0].signbit().any()


def test_sparsegpt_of_nothing_changes_nothing():
    weight, inputs = make_layer(6, 24)
    inputs[:, 3] = 0.0
    mask, updated = sparsegpt_prune(weight, gram_of(inputs), 0.0)
    assert mask.all()
    assert torch.equal(updated, weight)


def test_sparsegpt_refuses_a_matrix_that_is_no_hessian():
    gram = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(ValueError, match=r"not positive definite with damping=0\.01.*Raise damping"):
        inverse_hessian_factor(gram, 0.01)


def reconstruction_error(weight: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (weight - pruned).double().T).square().sum())


@pytest.mark.parametrize("target", [0.5, 0.7, Pattern(2, 4), Pattern(4, 8)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_reconstructs_better_than_wanda_better_than_magnitude(target, seed):
    weight, inputs = make_layer(32, 64, seed)
    errors = [
        reconstruction_error(weight, sparsegpt_prune(weight, gram_of(inputs), target)[1], inputs),
        reconstruction_error(
            weight, apply_mask(weight, wanda_mask(weight, statistics_of(inputs).norm, target)), inputs
        ),
        reconstruction_error(weight, apply_mask(weight, magnitude_mask(weight, target)), inputs),
    ]
    assert errors[0] < errors[1] < errors[2]


def loop_dsnot(weight, mask, inputs, target, max_cycles, threshold):
    """One row at a time, one swap at a time, with lists."""
    mask = mask.clone()
    mean, variance = inputs.double().mean(0).tolist(), inputs.double().var(0, unbiased=False).tolist()
    norm = inputs.double().norm(dim=0).tolist()
    for row in range(weight.shape[0]):
        w = weight[row].double().tolist()
        error = sum(w[j] * mean[j] for j in range(len(w)) if not mask[row, j])
        pruned = {j for j in range(len(w)) if not mask[row, j]}
        kept = {j for j in range(len(w)) if mask[row, j]}
        for _ in range(max_cycles):
            sign = math.copysign(1, error)
            candidates = [j for j in sorted(pruned) if sign * w[j] * mean[j] > 0]
            if abs(error) <= threshold or not candidates:
                break
            grow = max(candidates, key=lambda j: sign * w[j] * mean[j] / variance[j])
            pruned.remove(grow)
            partners = [j for j in sorted(kept) if sign * w[j] * mean[j] < 0]
            if isinstance(target, Pattern):
                partners = [j for j in partners if j // target.group == grow // target.group]
            if not partners:
                continue
            prune = min(partners, key=lambda j: abs(w[j]) * norm[j])
            after = error + w[prune] * mean[prune] - w[grow] * mean[grow]
            if abs(after) < abs(error):
                error = after
                kept.remove(prune)
                mask[row, grow], mask[row, prune] = True, False
    return mask


@pytest.mark.parametrize("target", [0.5, 0.7, Pattern(2, 4), Pattern(4, 8)], ids=str)
@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
@pytest.mark.parametrize(("max_cycles", "threshold"), [(100, 0.0), (3, 0.0), (100, 0.3)])
def test_dsnot_equals_plain_loops(target, initial, max_cycles, threshold):
    weight, inputs = make_layer(16, 32)
    statistics = statistics_of(inputs)
    mask = wanda_mask(weight, statistics.norm, target) if initial == "wanda" else magnitude_mask(weight, target)
    refined = dsnot_refine(weight, mask, statistics, target, max_cycles, threshold)
    assert torch.equal(refined, loop_dsnot(weight, mask, inputs, target, max_cycles, threshold))
    assert not torch.equal(refined, mask)


@pytest.mark.parametrize("target", [0.5, Pattern(2, 4)], ids=str)
def test_dsnot_lowers_the_expected_error_and_keeps_the_counts(target):
    weight, inputs = make_layer(16, 32)
    statistics = statistics_of(inputs)
    mask = wanda_mask(weight, statistics.norm, target)
    refined = dsnot_refine(weight, mask, statistics, target, threshold=0.0)
    contribution = weight.double() * inputs.double().mean(0)
    before, after = ((contribution * ~kept).sum(1).abs() for kept in (mask, refined))
    assert (after <= before + 1e-9).all()
    assert after.sum() < 0.5 * before.sum()
    assert torch.equal(refined.sum(1), mask.sum(1))
    if isinstance(target, Pattern):
        assert meets_pattern(apply_mask(weight, refined), target)


def test_dsnot_leaves_rows_within_the_threshold_alone():
    weight, inputs = make_layer(16, 32)
    statistics = statistics_of(inputs)
    mask = wanda_mask(weight, statistics.norm, 0.5)
    assert torch.equal(dsnot_refine(weight, mask, statistics, 0.5, threshold=1e9), mask)
    assert torch.equal(dsnot_refine(weight, mask, statistics, 0.5, max_cycles=0, threshold=0.0), mask)


def test_dsnot_copes_with_inputs_that_never_vary():
    weight, inputs = make_layer(8, 16)
    inputs[:, :4], inputs[:, 4:8] = 0.0, 1.0
    mask = dsnot_refine(weight, torch.rand(8, 16) > 0.5, statistics_of(inputs), 0.5, threshold=0.0)
    assert mask.shape == (8, 16)


@st.composite
def patterns(draw) -> Pattern:
    group = draw(st.integers(2, 8))
    return Pattern(draw(st.integers(1, group - 1)), group)


@settings(max_examples=60, deadline=None)
@given(
    pattern=patterns(), rows=st.integers(0, 5), groups=st.integers(0, 6), seed=st.integers(0, 999), ties=st.booleans()
)
def test_pattern_masks_keep_exactly_n_of_every_m(pattern, rows, groups, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, groups * pattern.group, generator=generator)
    scores = (scores * 3).round() if ties else scores
    mask = select(scores, pattern, per_row=True)
    kept = mask.reshape(-1, pattern.group)
    assert (kept.sum(1) == pattern.kept).all()
    assert meets_pattern(mask.float(), pattern)
    values = scores.reshape(-1, pattern.group)
    lowest_kept = values.masked_fill(~kept, math.inf).amin(1)
    highest_lost = values.masked_fill(kept, -math.inf).amax(1)
    assert (lowest_kept >= highest_lost).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 7), width=st.integers(1, 13), sparsity=st.floats(0, 0.999), per_row=st.booleans())
def test_unstructured_masks_lose_the_share_to_one_weight(rows, width, sparsity, per_row):
    mask = select(torch.rand(rows, width), sparsity, per_row)
    assert abs((~mask).sum().item() - sparsity * mask.numel()) <= 0.5
    if per_row:
        lost = (~mask).sum(1)
        assert lost.max() - lost.min() <= 1


def test_prune_counts_spread_the_rest_over_the_rows():
    assert prune_counts(10, 4, 0.5).tolist() == [1, 1, 1, 2]
    assert prune_counts(8, 2, 0.0).tolist() == [0, 0]


def test_of_equal_scores_the_first_go():
    assert keep_largest(torch.ones(1, 4), 2).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_positive(dtype):
    weight = torch.tensor([[-1.0, 2.0, -0.0, -3.0]], dtype=dtype)
    masked = apply_mask(weight, torch.tensor([[False, True, True, True]]))
    assert masked.tolist() == [[0.0, 2.0, 0.0, -3.0]]
    assert masked.signbit().tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("text", ["2-4", "4:2", "4:4", "0:4", "2:", "", "two:four", "-1:4", "2:4:8"])
def test_malformed_patterns_are_refused(text):
    with pytest.raises(ValueError, match="is not an n:m pattern.*'2:4' or '4:8'"):
        Pattern.parse(text)


def test_patterns_know_their_sparsity_and_name():
    pattern = Pattern.parse(" 3:8 ")
    assert (pattern.kept, pattern.group, pattern.sparsity, str(pattern)) == (3, 8, 0.625, "3:8")


@pytest.mark.parametrize("prune", [
    lambda weight: magnitude_mask(weight, Pattern(2, 4)),
    lambda weight: wanda_mask(weight, torch.ones(6), Pattern(2, 4)),
    lambda weight: sparsegpt_prune(weight, torch.eye(6), Pattern(2, 4)),
])  # fmt: skip
def test_patterns_that_do_not_divide_the_width_are_refused(prune):
    with pytest.raises(ValueError, match="pattern='2:4' does not divide the width.*6 inputs are no multiple of 4"):
        prune(torch.randn(3, 6))


def test_a_width_the_group_does_not_divide_does_not_meet_the_pattern():
    assert not meets_pattern(torch.zeros(2, 6), Pattern(2, 4))
    assert meets_pattern(torch.zeros(2, 8), Pattern(2, 4))
    assert not meets_pattern(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), Pattern(2, 4))
