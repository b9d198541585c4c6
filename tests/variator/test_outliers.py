"""`keep_outliers`: a share of each text's tokens, told by a calibrated probe, is never merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_variator import VariatorConfig, allocate, calibrate
from peft_variator.profiling import count_flops
from peft_variator.tuners.variator.neuron_selection import needs_calibration
from peft_variator.tuners.variator.outliers import choose_outliers, share_of
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name

from .reference import assert_same, feed_forward_of, first, kept_ends, layers_of, plugin_output, text_groups, watch


CASES = {case.name: case for case in ALL}
T5, VIT, LLAVA, MIXTRAL = CASES["t5"], CASES["vit"], CASES["llava"], CASES["mixtral"]
SHARE = 0.3


def with_probe(case: Case, **fields: Any) -> PeftModel:
    """A plugin whose weights, probes included, are random."""
    torch.manual_seed(1)
    fields = {"keep_outliers": SHARE, "bottleneck_dim": 8, "init_weights": False} | fields
    return get_peft_model(case.build(), VariatorConfig(**fields)).eval()


def padded(case: Case, side: str, seed: int) -> dict[str, Tensor]:
    """Texts of 17, 5, 1 and 12 tokens."""
    ids, lengths = case.inputs(4, 17, seed)["input_ids"], torch.tensor([[17], [5], [1], [12]])
    places = torch.arange(17)
    mask = places < lengths if side == "right" else places >= 17 - lengths
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


def expected_outliers(scores: list[float], may_merge: list[bool], share: float) -> set[int]:
    """The plain rule for one text, whose places are all real tokens."""
    candidates = [place for place, may in enumerate(may_merge) if may]
    candidates.sort(key=lambda place: (-scores[place], place))
    return set(candidates[: math.ceil(round(share * len(scores), 9))])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_against_a_loop_over_texts(case: Case, side: str, seed: int) -> None:
    model, inputs = with_probe(case, keep_first_tokens=2), padded(case, side, seed)
    seen = watch(model, lambda: first(model, inputs))
    scores = seen[0].inputs @ seen[0].layer.variator_outliers["default"].weight
    groups, kept_rows = [], 0
    for mask, score in zip(inputs["attention_mask"].bool(), scores, strict=True):
        places = mask.nonzero().flatten().tolist()
        ends = kept_ends(mask.tolist(), 2, 1)
        outliers = expected_outliers(score[mask].tolist(), [place not in ends for place in places], SHARE)
        groups.append(text_groups(mask.tolist(), ends | {places[index] for index in outliers}, 4))
        kept_rows += len(groups[-1])
    for each in seen:
        assert each.rows == kept_rows
        output = plugin_output(each.layer, feed_forward_of(model, each), each.inputs, groups, "default")
        torch.testing.assert_close(each.outputs, output, rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_highest_of_each_text_and_of_equals_the_first(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    length, share = sum(lengths), data.draw(st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.55, 0.99]))
    scores = [data.draw(st.integers(0, 3)) for _ in range(length)]
    real = [data.draw(st.booleans()) for _ in range(length)]
    may = [is_real and data.draw(st.booleans()) for is_real in real]
    expected, start = set(), 0
    for count in lengths:
        places = [place for place in range(start, start + count) if real[place]]
        found = expected_outliers([scores[place] for place in places], [may[place] for place in places], share)
        expected |= {places[index] for index in found}
        start += count
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[0, torch.tensor(lengths).cumsum(0)[:-1]] = True
    flags = choose_outliers(
        torch.tensor([scores]).float(),
        torch.tensor([may]),
        None if all(real) else torch.tensor([real]),
        starts if len(lengths) > 1 else None,
        share_of(share),
    )
    assert set(flags[0].nonzero().flatten().tolist()) == expected


def test_a_flattened_batch_gives_what_each_text_gives_alone() -> None:
    model, lengths = with_probe(LLAMA), (7, 1, 9, 14)
    texts = [LLAMA.inputs(1, length, seed)["input_ids"] for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)

    def last_hidden(**inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]

    flat = last_hidden(input_ids=torch.cat(texts, 1), position_ids=positions)
    for text, own in zip(texts, flat.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(own, last_hidden(input_ids=text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [BERT, LLAMA, T5, LLAVA, MIXTRAL], ids=by_name)
def test_saved_loaded_and_at_one_the_base(case: Case, tmp_path: Path) -> None:
    model, inputs = with_probe(case), case.inputs(2, 16)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert loaded.peft_config["default"].keep_outliers == SHARE
        assert_same(first(loaded, inputs), first(model, inputs))
    assert not torch.allclose(first(model, inputs), first(with_probe(case, keep_outliers=None), inputs))
    loaded.set_compression_ratio(1)
    assert_same(first(loaded, inputs), first(case.build(), inputs))


# The probe


def test_a_probe_that_was_not_fitted_is_an_error_where_it_is_used() -> None:
    model, inputs = with_probe(BERT, init_weights=True), BERT.inputs(2, 16)
    assert needs_calibration(model)
    with pytest.raises(RuntimeError, match="calibrate"):
        first(model, inputs)
    model.set_compression_ratio(1)
    assert torch.equal(first(model, inputs), first(BERT.build(), inputs))
    model.set_compression_ratio(4)
    calibrate(model, iter([BERT.inputs(4, 20)]))
    assert not needs_calibration(model)
    first(model, inputs)


@pytest.mark.parametrize("decompression", ["bottleneck", "neurons"])
@pytest.mark.parametrize("case", [BERT, LLAMA, MIXTRAL], ids=by_name)
def test_the_probe_is_the_least_squares_fit_of_the_outputs_norm(case: Case, decompression: str) -> None:
    fields: dict[str, Any] = {"bottleneck_dim": 8 if decompression == "bottleneck" else None}
    if case.has_experts and decompression == "neurons":
        pytest.skip("experts take the bottleneck")
    model = with_probe(case, init_weights=True, decompression=decompression, **fields)
    batches = [{**padded(case, "right", seed)} for seed in range(8)]
    with model.disable_adapter():
        calls = [watch(model, lambda batch=batch: first(model, batch)) for batch in batches]
    calibrate(model, batches)
    for index, layer in enumerate(layers_of(model)):
        masks = [batch["attention_mask"].bool() for batch in batches]
        inputs = torch.cat([seen[index].inputs[mask] for seen, mask in zip(calls, masks, strict=True)]).double()
        outputs = torch.cat([seen[index].outputs[mask] for seen, mask in zip(calls, masks, strict=True)]).double()
        targets = outputs.norm(dim=-1).log()
        columns = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        best = columns @ torch.linalg.lstsq(columns, targets.unsqueeze(1)).solution.flatten()
        found = inputs @ layer.variator_outliers["default"].weight.double()
        found = found + (targets - found).mean()
        # The ridge costs next to nothing.
        assert (found - targets).square().mean() < 1.02 * (best - targets).square().mean()


def test_what_was_calibrated_goes_with_the_plugin(tmp_path: Path) -> None:
    model, inputs = with_probe(LLAMA, init_weights=True), LLAMA.inputs(2, 16)
    calibrate(model, [LLAMA.inputs(4, 20, 1)])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    assert not needs_calibration(loaded)
    assert torch.equal(first(loaded, inputs), first(model, inputs))


def test_calibration_that_fails_changes_nothing() -> None:
    model = with_probe(BERT, init_weights=True)
    with pytest.raises(ValueError, match="keep_outliers"):
        calibrate(model, [])
    calibrate(model, [BERT.inputs(4, 20)])
    before = [layer.variator_outliers["default"].weight.clone() for layer in layers_of(model)]
    with torch.no_grad():
        layers_of(model)[1].variator_up["default"].weight.add_(1)
    with pytest.raises(ValueError, match="trained"):
        calibrate(model, [BERT.inputs(4, 20, 1)])
    assert all(
        torch.equal(layer.variator_outliers["default"].weight, old)
        for layer, old in zip(layers_of(model), before, strict=True)
    )


def test_nothing_trains_the_probe() -> None:
    model = with_probe(BERT).train()
    assert not any("outliers" in name for name, _ in model.named_parameters())
    first_output = next(iter(model(**BERT.inputs(2, 16)).values()))
    first_output.square().mean().backward()


def test_the_first_module_that_merges_decides(tmp_path: Path) -> None:
    """Where a schedule leaves the first module alone, the second one's probe is asked."""
    model, inputs = with_probe(BERT, ratio_schedule={4: {"layer.0": 1}}), BERT.inputs(2, 16)
    assert [layer.name.split(".")[2] for layer in layers_of(model)] == ["1"]
    both = with_probe(BERT, ratio_pattern={"layer.0": 1})
    seen = watch(both, lambda: first(both, inputs))
    scores = seen[1].inputs @ seen[1].layer.variator_outliers["default"].weight
    kept = expected_outliers(scores[0].tolist(), [False] + [True] * 14 + [False], SHARE) | {0, 15}
    groups = [text_groups([True] * 16, kept, 4)]
    seen[1].inputs, seen[1].outputs = seen[1].inputs[:1], seen[1].outputs[:1]
    output = plugin_output(seen[1].layer, feed_forward_of(both, seen[1]), seen[1].inputs, groups, "default")
    torch.testing.assert_close(seen[1].outputs, output, rtol=1e-4, atol=1e-5)


# What it costs, and where it goes


def test_flops_count_the_rows_that_are_kept() -> None:
    inputs = BERT.inputs(2, 32)
    flops = [count_flops(with_probe(BERT, keep_outliers=share), inputs) for share in (None, 0.1, 0.4)]
    assert flops[0] < flops[1] < flops[2]


def test_allocated_with_outliers() -> None:
    batches = [BERT.inputs(2, 24, seed) for seed in range(2)]
    base = BERT.build()
    config = allocate(base, batches, 0.1, keep_outliers=0.1, correction_dim=4)
    assert config.keep_outliers == 0.1
    model, total = get_peft_model(base, config), count_flops(BERT.build(), BERT.inputs(1, 24))
    calibrate(model, batches)
    assert abs(1 - count_flops(model, BERT.inputs(1, 24)) / total - 0.1) <= 0.02


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_compiled_and_exported(case: Case) -> None:
    model, inputs = with_probe(case, keep_outliers=0.5), padded(case, "right", 0)
    expected = first(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(first(compiled, inputs)[real], expected[real], rtol=0, atol=1e-5)
    if case is BERT:
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        with torch.no_grad():
            program = torch.export.export(
                model.get_base_model(), (), inputs, dynamic_shapes=dict.fromkeys(inputs, free)
            )
        longer = case.inputs(3, 30, 5)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        torch.testing.assert_close(first(program.module(), longer), first(model, longer), rtol=0, atol=1e-5)


def test_images_and_sound_have_no_outliers() -> None:
    with pytest.raises(ValueError, match="keep_outliers"):
        with_probe(VIT)
    model = with_probe(LLAVA)
    assert {("vision" in layer.name, "default" in layer.variator_outliers) for layer in layers_of(model)} == {
        (True, False),
        (False, True),
    }


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, 1.5, float("nan"), True, "0.1"])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="keep_outliers"):
        VariatorConfig(keep_outliers=share)
