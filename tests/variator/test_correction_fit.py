"""`fit_correction`: what the copied neurons write is fitted by least squares before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_variator import VariatorConfig, calibrate, fit_correction, using_ratio
from peft_variator.tuners.variator import correction_fit
from peft_variator.tuners.variator.correction_fit import needs_fit
from peft_variator.tuners.variator.linear_maps import apply_linear
from peft_variator.tuners.variator.neuron_selection import needs_calibration
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name

from .reference import first, kept_ends, layers_of, text_groups


GPT2 = next(case for case in ALL if case.name == "gpt2")
VIT = next(case for case in ALL if case.name == "vit")


def with_neurons(case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(**{"correction_dim": 8, **fields})).eval()


def batches_of(case: Case, count: int = 4) -> list[dict[str, Tensor]]:
    return [case.inputs(4, 20, seed=seed) for seed in range(count)]


def out_of(model: PeftModel) -> list[Tensor]:
    return [layer.modules_of("default")["variator_neuron_out"].weight.detach().clone() for layer in layers_of(model)]


def errors_of(model: PeftModel, case: Case, batches: list[dict[str, Tensor]]) -> list[float]:
    """Of each network, the squared errors of the plugin on the base model's hidden states, over those of F."""
    found = []
    for layer in layers_of(model):
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        with model.disable_adapter():
            for batch in batches:
                first(model, batch)
        handle.remove()
        parts, network = layer.modules_of("default"), layer.network()
        assert network is not None

        def neurons(x: Tensor, parts: dict[str, nn.Module] = parts) -> Tensor:
            activated = parts["variator_neurons"](apply_linear(parts["variator_neuron_into"], x))
            gate = parts.get("variator_neuron_gate")
            return activated if gate is None else activated * apply_linear(gate, x)

        error = size = 0.0
        for sequence in torch.cat(inputs):
            real = [True] * len(sequence)
            for group in text_groups(real, kept_ends(real, 1, 1), 4):
                if len(group) == 1:
                    continue
                members = sequence[group]
                merged = members.mean(0)  # an untrained scorer weighs them alike
                with torch.no_grad():
                    wanted = network.out(network.neurons(members))
                    given = network.out(network.neurons(merged))
                    given = given + (neurons(members) - neurons(merged)) @ parts["variator_neuron_out"].weight.t()
                error += float((wanted - given).square().sum())
                size += float(wanted.square().sum())
        found.append(error / size)
    return found


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("form", ["added", "sliced"])
@pytest.mark.parametrize("case", [BERT, LLAMA, GPT2], ids=by_name)
def test_the_errors_become_less_on_texts_that_were_not_seen(case: Case, form: str, rank: int | None) -> None:
    model = with_neurons(case, correction_form=form, correction_rank=rank)
    others = [case.inputs(4, 20, seed=seed) for seed in (100, 101)]
    before = errors_of(model, case, others) if form == "added" else None
    outputs = first(model, others[0])
    fit_correction(model, batches_of(case, 8))
    assert not torch.equal(first(model, others[0]), outputs)
    if before is not None:
        after = errors_of(model, case, others)
        assert all(new < old for new, old in zip(after, before, strict=True))
    base = first(case.build(), others[0])
    assert (first(model, others[0]) - base).norm() < (outputs - base).norm()


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_it_is_the_least_squares_solution(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a ridge worth its name, and taken whatever other tokens say, no other v does better on what was seen."""
    monkeypatch.setattr(correction_fit, "RIDGES", (1e-10,))
    monkeypatch.setattr(correction_fit._Moments, "_gain", lambda self, weight: 1.0)
    batches = batches_of(case, 8)
    model = with_neurons(case)
    start = errors_of(model, case, batches)
    fit_correction(model, batches)
    best, fitted = errors_of(model, case, batches), out_of(model)
    assert all(new < old for new, old in zip(best, start, strict=True))
    for step in (0.01, -0.01):
        for layer, weight in zip(layers_of(model), fitted, strict=True):
            torch.manual_seed(0)
            out = layer.modules_of("default")["variator_neuron_out"]
            with torch.no_grad():
                out.weight.copy_(weight + step * torch.randn_like(weight))
        assert all(new > old for new, old in zip(errors_of(model, case, batches), best, strict=True))


def test_several_ratios_are_fitted_together() -> None:
    batches = batches_of(BERT)
    alone, together = with_neurons(BERT), with_neurons(BERT)
    fit_correction(alone, batches)
    fit_correction(together, iter(batches), ratios=[2, 4, 8])
    assert not torch.allclose(out_of(alone)[0], out_of(together)[0])
    with using_ratio(together, 1):
        assert torch.equal(first(together, batches[0]), first(BERT.build(), batches[0]))


@pytest.mark.parametrize(("batches", "ratios", "calls"), [(6, [2, 4], 6), (5, [2, 4, 8], 5), (1, [2, 4, 8], 3)])
def test_ratios_take_the_batches_by_turns(batches: int, ratios: list[int], calls: int) -> None:
    model, seen = with_neurons(BERT), []
    encoder = model.get_base_model()
    encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = batches_of(BERT, batches)
    fit_correction(model, given, ratios=ratios)
    assert len(seen) == calls
    assert len({call["input_ids"].sum().item() for call in seen}) == batches  # each of them


def test_what_is_summed_is_not_rounded_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the products of the model alone."""
    added = []
    monkeypatch.setattr(
        correction_fit._Moments, "solve", lambda moments: added.append((moments.squares, moments.products))
    )
    seen: list[tuple[Tensor, Tensor]] = []
    add = correction_fit._Moments.add
    monkeypatch.setattr(
        correction_fit._Moments,
        "add",
        lambda moments, z, e: (seen.append((z.double(), e.double())), add(moments, z, e))[1],
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit_correction(with_neurons(BERT), batches_of(BERT, 1))
    for (z, e), (squares, products) in zip(seen, added, strict=True):
        torch.testing.assert_close(squares.sum(0), z.t() @ z, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(products.sum(0), z.t() @ e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other_row", [1, 2, 8])
def test_a_layer_that_merges_in_any_row_of_a_schedule_is_calibrated_and_fitted(other_row: int) -> None:
    """Also where the row of the largest key leaves it alone."""
    names = [layer.name for layer in layers_of(with_neurons(BERT))]
    rows = {4: dict.fromkeys(names, 4), 16: {names[0]: 4, **dict.fromkeys(names[1:], other_row)}}
    found = []
    for schedule in ({4: rows[4]}, rows):
        model = with_neurons(BERT, compression_ratio=4, ratio_schedule=schedule)
        calibrate(model, batches_of(BERT))
        chosen = [layer.modules_of("default")["variator_neurons"].index.tolist() for layer in layers_of(model)]
        fit_correction(model, batches_of(BERT), ratios=[4])
        found.append((chosen, out_of(model)))
        assert needs_calibration(model) is False
    if other_row == 1:  # the layers that row 16 leaves alone are calibrated at row 4
        assert found[0][0] == found[1][0]
        for alone, scheduled in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(scheduled, alone)
    untouched = out_of(with_neurons(BERT, compression_ratio=4, ratio_schedule=rows))
    assert not any(torch.equal(fitted, start) for fitted, start in zip(found[1][1], untouched, strict=True))


@pytest.mark.parametrize("case", [BERT, LLAMA, VIT], ids=by_name)
def test_at_the_whole_width_there_is_nothing_to_make_good_for(case: Case) -> None:
    model = with_neurons(case, correction_dim=1.0)
    fit_correction(model, batches_of(case))
    torch.testing.assert_close(
        first(model, case.inputs(2, 12)), first(case.build(), case.inputs(2, 12)), rtol=1e-3, atol=1e-4
    )


def test_layers_are_fitted_in_as_many_passes_as_their_sums_need(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, found = batches_of(BERT), []
    for room in (1 << 27, 1):
        monkeypatch.setattr(correction_fit, "_MAX_SUMS", room)
        model = with_neurons(BERT)
        fit_correction(model, batches)
        found.append(out_of(model))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_padding_counts_for_nothing() -> None:
    batches = batches_of(BERT)
    model, padded = with_neurons(BERT), with_neurons(BERT)
    fit_correction(model, batches)
    for batch in batches:
        batch["attention_mask"] = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 7))
        batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 7))
        batch.pop("token_type_ids", None)
    fit_correction(padded, batches)
    for one, other in zip(out_of(model), out_of(padded), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_fitted_is_an_error_and_nothing_changes() -> None:
    model = with_neurons(BERT)
    before = out_of(model)
    with pytest.raises(ValueError, match="no tokens that are merged"):
        fit_correction(model, [BERT.inputs(2, 2)])
    with pytest.raises(ValueError, match="ratio=1 has to be"):
        fit_correction(model, batches_of(BERT), ratios=[1])
    with pytest.raises(TypeError, match="has to be a dict"):
        fit_correction(model, [torch.ones(2, 2)])
    assert all(torch.equal(one, other) for one, other in zip(before, out_of(model), strict=True))
    assert needs_fit(model)
    calibrate(model, batches_of(BERT))
    fit_correction(model, batches_of(BERT))
    assert not needs_fit(model)
    for function in (calibrate, fit_correction):
        with pytest.raises(ValueError, match="trained or fitted"):
            function(model, batches_of(BERT))
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_correction(with_neurons(BERT, decompression="bottleneck", correction_dim=None), batches_of(BERT))


def test_numbers_that_are_not_finite_leave_a_network_as_it_is() -> None:
    model = with_neurons(BERT)
    before, batches = out_of(model), batches_of(BERT)
    with torch.no_grad():
        model.get_input_embeddings().weight[batches[0]["input_ids"][0, 3]] = torch.nan
    with pytest.warns(UserWarning, match=r"layer\.0\.\w+ gives values that are not finite"):
        fit_correction(model, batches)
    assert all(torch.equal(one, other) for one, other in zip(out_of(model), before, strict=True))
