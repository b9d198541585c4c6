"""How much each block loses: ECoFLaP's scores and budgets, and the global target."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from peft_variator.sparsity import PruningConfig, prune
from peft_variator.sparsity.ecoflap import first_order_scores, spread_budgets, water_fill, zeroth_order_scores
from peft_variator.sparsity.modules import find_targets

from .cases import make


@pytest.fixture
def bar():
    return Progress(disable=True)


def by_block(model, **fields):
    blocks = {}
    for target in find_targets(model, PruningConfig(sparsity=0.5, **fields)):
        blocks.setdefault(target.block, []).append(target)
    return blocks


def weights_of(blocks, block):
    return [target.module.weight for target in blocks[block]]


@settings(max_examples=200, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 1e6)), min_size=1, max_size=12),
    sparsity=st.floats(0, 0.95),
    room=st.floats(0, 1),
)
def test_budgets_meet_the_target_within_their_bounds(blocks, sparsity, room):
    sizes = {f"b{i}": size for i, (size, _) in enumerate(blocks)}
    scores = {f"b{i}": score for i, (_, score) in enumerate(blocks)}
    if not any(score > 0 for score in scores.values()):
        scores["b0"] = 1.0
    highest = sparsity + room * (0.999 - sparsity)
    budgets = water_fill(scores, sizes, sparsity, highest)
    total = sum(budgets[name] * size for name, size in sizes.items())
    assert total == pytest.approx(sparsity * sum(sizes.values()), rel=1e-6, abs=1e-6)
    assert all(-1e-9 <= value <= highest + 1e-9 for value in budgets.values())


def test_what_is_kept_beyond_the_floor_follows_the_scores():
    budgets = water_fill({"a": 1.0, "b": 3.0}, {"a": 1000, "b": 1000}, sparsity=0.7, highest=0.9)
    # 2000 * 0.3 = 600 kept; 200 are the floor, 400 are shared 1 : 3.
    assert budgets == pytest.approx({"a": 0.8, "b": 0.6})


def test_a_full_block_gives_the_rest_to_the_others():
    budgets = water_fill({"a": 1e9, "b": 2.0, "c": 1.0}, {"a": 100, "b": 100, "c": 100}, sparsity=0.5, highest=1.0)
    # 150 kept: all 100 of a, and 50 shared 2 : 1.
    assert budgets == pytest.approx({"a": 0.0, "b": 1 - 100 / 300, "c": 1 - 50 / 300})


def test_a_block_without_score_is_pruned_to_the_limit_unless_the_others_are_full():
    assert water_fill({"a": 1.0, "b": 0.0}, {"a": 100, "b": 100}, 0.5, 0.8) == pytest.approx({"a": 0.2, "b": 0.8})
    assert water_fill({"a": 1.0, "b": 0.0}, {"a": 100, "b": 100}, 0.3, 0.8) == pytest.approx({"a": 0.0, "b": 0.6})


@pytest.mark.parametrize("scores", [{"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 1.0}, {"a": math.nan, "b": 1.0}])
def test_scores_that_rank_nothing_are_refused(scores):
    with pytest.raises(ValueError, match="Block scores must be finite and not negative"):
        water_fill(scores, {"a": 10, "b": 10}, 0.5, 0.8)


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.777])
def test_whole_weights_add_up_to_the_budgets(sparsity):
    model, _ = make("llava")
    targets = find_targets(model, PruningConfig(sparsity=0.5))
    spread = spread_budgets(targets, dict.fromkeys((target.block for target in targets), sparsity))
    lost = [round(target.target * target.module.weight.numel(), 6) for target in spread]
    assert all(count == int(count) for count in lost)
    assert abs(sum(lost) - sparsity * sum(target.module.weight.numel() for target in targets)) <= 0.5


def test_first_order_scores_are_sums_of_weight_times_gradient(bar):
    model, batches = make("llama")
    blocks = by_block(model)
    scores = first_order_scores(model, blocks, batches, bar)
    for block in blocks:
        expected = 0.0
        for batch in batches:
            gradients = torch.autograd.grad(model(**batch).loss, weights_of(blocks, block))
            expected += sum(
                (w * g).abs().sum().item() for w, g in zip(weights_of(blocks, block), gradients, strict=True)
            )
        assert scores[block] == pytest.approx(expected / len(batches), rel=1e-4)


def test_first_order_scores_leave_no_trace(bar):
    model, batches = make("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    marked = model.model.layers[1].mlp.up_proj.weight
    marked.grad = torch.ones_like(marked)
    before = copy.deepcopy(model.state_dict())
    first_order_scores(model, by_block(model), batches, bar)
    assert not frozen.requires_grad
    assert model.lm_head.weight.requires_grad
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(**batches[0]).loss.backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad is not None


def test_zeroth_order_scores_estimate_the_gradient_norm(bar):
    model, batches = make("llama")
    model = model.double()
    blocks = by_block(model)
    scores = zeroth_order_scores(model, blocks, batches[:1] * 60, 1e-4, 0, bar)
    for block in blocks:
        weights = weights_of(blocks, block)
        norm = math.sqrt(sum(g.square().sum() for g in torch.autograd.grad(model(**batches[0]).loss, weights)))
        size, total = sum(w.numel() for w in weights), sum(w.abs().sum().item() for w in weights)
        # E|g.z| of a standard normal z is |g| * sqrt(2 / pi).
        expected = total * norm * math.sqrt(2 / math.pi) / math.sqrt(size)
        assert scores[block] == pytest.approx(expected, rel=0.3)


def test_zeroth_order_scores_leave_weights_and_hooks_alone(bar):
    model, batches = make("llava")
    before = copy.deepcopy(model.state_dict())
    expected = model(**batches[0]).logits
    first = zeroth_order_scores(model, by_block(model), batches, 1e-3, 7, bar)
    assert zeroth_order_scores(model, by_block(model), batches, 1e-3, 7, bar) == first
    assert zeroth_order_scores(model, by_block(model), batches, 1e-3, 8, bar) != first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**batches[0]).logits, expected)


@pytest.mark.parametrize("order", ["zeroth", "first"])
@pytest.mark.parametrize("name", ["llava", "blip2", "clip"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_global_target_is_met_over_both_towers(name, order, method):
    model, batches = make(name)
    config = PruningConfig(method=method, sparsity=0.55, allocation="ecoflap", score_order=order)
    report = prune(model, config, batches, progress=False)
    assert abs(report.sparsity - 0.55) < 0.001 * 0.55
    assert {row.name for row in report.grouped("modality")} == {"vision", "language"}
    shares = [row.sparsity for row in report.grouped("block")]
    assert max(shares) - min(shares) > 0.01
    assert max(shares) < 0.8 + 0.01


def test_a_block_the_loss_does_not_depend_on_is_pruned_most():
    model, batches = make("llava")  # its last vision block is run and not used: vision_feature_layer is -2
    report = prune(model, PruningConfig(sparsity=0.5, allocation="ecoflap"), batches, progress=False)
    blocks = {row.name: row.sparsity for row in report.grouped("block")}
    assert blocks["model.vision_tower.encoder.layers.1"] == pytest.approx(0.8, abs=0.01)
    assert blocks["model.vision_tower.encoder.layers.1"] == max(blocks.values())


def test_only_the_first_score_batches_are_scored():
    model, batches = make("llama")
    broken = {**batches[0], "labels": None}
    config = PruningConfig(method="magnitude", sparsity=0.5, allocation="ecoflap", score_batches=2)
    prune(model, config, [*batches, broken], progress=False)
    with pytest.raises(ValueError, match="Add labels to them"):
        prune(model, PruningConfig(sparsity=0.5, allocation="ecoflap", score_batches=3), [*batches, broken])


@pytest.mark.parametrize("order", ["zeroth", "first"])
def test_a_loss_that_is_not_finite_is_named(order):
    model, batches = make("llama")
    model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="loss on a calibration batch is nan"):
        prune(model, PruningConfig(sparsity=0.5, allocation="ecoflap", score_order=order), batches, progress=False)
