"""`correction_form="sliced"`: the network runs without the copied neurons at merged rows, which is less work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_variator import VariatorConfig, calibrate
from peft_variator.profiling import count_flops
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name

from .reference import assert_the_plugin_alone_learns, feed_forward_of, first, kept_ends, layers_of, text_groups, watch


CASES = {case.name: case for case in ALL}
FORMS = [BERT, LLAMA, *(CASES[name] for name in ("flan-t5", "gpt2", "modernbert", "phi3", "opt", "vit"))]


def with_neurons(case: Case, form: str = "sliced", **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    fields = {"correction_dim": 12} | fields
    return get_peft_model(case.build(), VariatorConfig(correction_form=form, **fields)).eval()


def padded(case: Case) -> dict[str, Tensor]:
    ids = case.inputs(3, 13)["input_ids"]
    mask = torch.arange(13) < torch.tensor([[13], [2], [9]])
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_starts_at_the_value_of_the_added_form(case: Case) -> None:
    inputs, sliced, added = case.inputs(2, 13), with_neurons(case), with_neurons(case, "added")
    torch.testing.assert_close(first(sliced, inputs), first(added, inputs), rtol=1e-4, atol=2e-5)
    assert not torch.allclose(first(sliced, inputs), first(case.build(), inputs), atol=1e-2)
    sliced.set_compression_ratio(1)
    assert torch.equal(first(sliced, inputs), first(case.build(), inputs))


@pytest.mark.parametrize("fields", [{}, {"keep_first_tokens": 0, "keep_last_tokens": 0}], ids=["kept", "none kept"])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_with_padding_too(case: Case, fields: dict[str, Any]) -> None:
    inputs = padded(case)
    found, expected = (first(with_neurons(case, form, **fields), inputs) for form in ("sliced", "added"))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", [BERT, LLAMA, CASES["gpt2"]], ids=by_name)
def test_against_a_loop_over_tokens(case: Case) -> None:
    """y = F(m) − Σ_{j∈S} v_j·a_j(m) of the base + Σ_{j∈S} v_j·a_j(x) of the trained copies."""
    model, inputs = with_neurons(case, init_weights=False), case.inputs(2, 13)
    start = with_neurons(case)  # of the same neurons: they are chosen without data

    def contribution(layer: VariatorLayer, vector: Tensor) -> Tensor:
        parts = layer.modules_of("default")
        activated = parts["variator_neurons"](parts["variator_neuron_into"](vector))
        gate = parts.get("variator_neuron_gate")
        return parts["variator_neuron_out"](activated if gate is None else activated * gate(vector))

    with torch.no_grad():
        seen = watch(model, lambda: model(**inputs))
        for each, untrained in zip(seen, layers_of(start), strict=True):
            network, scorer = feed_forward_of(model, each), each.layer.variator_scorer["default"]
            assert torch.equal(
                untrained.variator_neurons["default"].index, each.layer.variator_neurons["default"].index
            )
            expected = torch.zeros_like(each.inputs)
            for index, sequence in enumerate(each.inputs):
                for group in text_groups([True] * 13, kept_ends([True] * 13, 1, 1), 4):
                    members = [sequence[position] for position in group]
                    weights = torch.softmax(torch.cat([scorer(member) for member in members]), 0)
                    merged = sum(weight * member for weight, member in zip(weights, members, strict=True))
                    rest = network(merged) - contribution(untrained, merged)
                    for position, member in zip(group, members, strict=True):
                        alone = len(group) == 1
                        expected[index, position] = (
                            network(member) if alone else rest + contribution(each.layer, member)
                        )
            torch.testing.assert_close(each.outputs, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_saves_the_work_of_the_copied_neurons_at_merged_rows(case: Case) -> None:
    inputs = case.inputs(1, 34)  # 32 tokens that are merged into 8 rows, or all but the last
    added, sliced = (count_flops(with_neurons(case, form), inputs) for form in ("added", "sliced"))
    maps = 3 if case is LLAMA else 2
    # In the added form the copies run at all 10 rows of a text, and the network runs whole at the 8 merged ones.
    assert added - sliced == 2 * (2 * maps * 32 * 12) * (10 + 8)


def test_learns_alone_and_follows_a_calibrated_choice(tmp_path: Path) -> None:
    model, added = with_neurons(BERT), with_neurons(BERT, "added")
    first(model, padded(BERT))
    for each in (model, added):
        calibrate(each, [BERT.inputs(4, 16, seed) for seed in range(2)])
    real = padded(BERT)["attention_mask"].bool()
    torch.testing.assert_close(
        first(model, padded(BERT))[real], first(added, padded(BERT))[real], rtol=1e-4, atol=2e-5
    )
    assert_the_plugin_alone_learns(model.train(), BERT)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BERT.build(), str(tmp_path)).eval()
    assert loaded.peft_config["default"].correction_form == "sliced"
    for each in (loaded, copy.deepcopy(loaded)):
        assert torch.equal(first(each, padded(BERT)), first(model, padded(BERT)))


@pytest.mark.parametrize("case", [pytest.param(BERT, marks=pytest.mark.slow), LLAMA], ids=by_name)
def test_compiled_with_every_other_option(case: Case) -> None:
    """In compiled code the copied neurons are silenced in place of being left out: the same value by another way."""
    fields: dict[str, Any] = {"compensation_rank": 2, "correction_rank": 2, "keep_outliers": 0.2}
    model, inputs = with_neurons(case, init_weights=False, **fields), padded(case)
    expected, real = first(model, inputs), inputs["attention_mask"].bool()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled, inputs)[real], expected[real], rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_weights_that_cannot_be_sliced_are_refused_by_name(tmp_path: Path) -> None:
    def quantised() -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(BERT.build(), {nn.Linear}, dtype=torch.qint8)

    for base in (
        quantised(),
        get_peft_model(BERT.build(), LoraConfig(target_modules=["output.dense"])).base_model.model,
    ):
        config = VariatorConfig(correction_form="sliced")
        with pytest.raises(ValueError, match=r"correction_form.*encoder\.layer\.0\.intermediate"):
            get_peft_model(base, config)
        assert not layers_of(base)
        get_peft_model(base, VariatorConfig(correction_form="added"))
    with_neurons(BERT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="correction_form"):
        PeftModel.from_pretrained(quantised(), str(tmp_path))


def test_an_added_plugin_is_not_called_sliced() -> None:
    with pytest.raises(ValueError, match="correction_form='else'"):
        VariatorConfig(correction_form="else")
    with pytest.raises(ValueError, match="correction_form='sliced'"):
        VariatorConfig(correction_form="sliced", bottleneck_dim=8)


@pytest.mark.parametrize("missing", [(), ("correction_form", "keep_outliers")], ids=["today", "before"])
def test_files_without_the_new_fields_load(missing: tuple[str, ...], tmp_path: Path) -> None:
    model, inputs = with_neurons(BERT, "added", init_weights=False), BERT.inputs(2, 12)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in saved.items() if name not in missing}))
    loaded = PeftModel.from_pretrained(BERT.build(), str(tmp_path)).eval()
    config = loaded.peft_config["default"]
    assert (config.correction_form, config.keep_outliers) == ("added", None)
    assert torch.equal(first(loaded, inputs), first(model, inputs))
