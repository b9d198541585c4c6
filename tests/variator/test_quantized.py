"""Plugins over quantised bases: in both orders, in every form, saved, loaded, trained, and with other libraries."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

from peft_variator import VariatorConfig, quantize_plugin, shrink_plugin
from peft_variator.tuners.variator.compensation import CompensatedLinear
from peft_variator.tuners.variator.linear_maps import SplitDynamicLinear
from peft_variator.tuners.variator.quantization import float_corrections
from tests.tiny_models import BERT, LLAMA, Case, by_name

from .reference import first


FORMS: dict[str, dict[str, Any]] = {
    "neurons": {"correction_dim": 16},
    "rank": {"correction_dim": 32, "correction_rank": 4},
    "compensated": {"correction_dim": 16, "compensation_rank": 3},
    "bottleneck": {"decompression": "bottleneck", "correction_dim": 16, "output_bias": True},
}


def quantized(model: nn.Module, dtype: torch.dtype = torch.qint8) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and about ranges
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)


def with_plugin(case: Case, form: str = "neurons") -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(init_weights=False, **FORMS[form])).eval()


def inputs_of(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    return inputs | {"attention_mask": mask}


def dequantized(model: nn.Module) -> nn.Module:
    """A copy in which every quantised map is a plain Linear with the rounded weights."""
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DynamicLinear):
                linear = nn.Linear(child.in_features, child.out_features, child.bias() is not None)
                with torch.no_grad():
                    linear.weight.copy_(child.weight().dequantize())
                    if child.bias() is not None:
                        linear.bias.copy_(child.bias())
                setattr(module, name, linear)
    return plain


def assert_close(
    found: nn.Module, reference: nn.Module, base: nn.Module, inputs: dict[str, Tensor], share: float = 0.25
) -> None:
    """Off by what rounding costs, which is little beside what a plugin changes."""
    outputs, expected, without = (first(model, inputs) for model in (found, reference, base))
    real = inputs["attention_mask"].bool()
    assert (outputs - expected)[real].norm() < share * (expected - without)[real].norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_every_order_gives_what_the_rounded_weights_give(case: Case, form: str, tmp_path: Path) -> None:
    inputs, plugin = inputs_of(case), with_plugin(case, form)
    plugin.save_pretrained(tmp_path)
    base_first = PeftModel.from_pretrained(quantized(case.build()), str(tmp_path)).eval()
    assert_close(base_first, dequantized(base_first), case.build(), inputs, share=0.15)
    alone = first(base_first, inputs)
    quantize_plugin(base_first)
    everything = quantized(plugin)
    quantize_plugin(everything)
    twice = quantized(PeftModel.from_pretrained(quantized(case.build()), str(tmp_path)).eval())
    for model in (base_first, everything, twice):
        assert_close(model, plugin, case.build(), inputs)
    # The correction is quantised with the base: the answers have changed.
    assert not torch.equal(first(base_first, inputs), alone)
    base_first.set_compression_ratio(1)
    assert torch.equal(first(base_first, inputs), first(quantized(case.build()), inputs))


def test_the_correction_is_quantised_and_the_scores_are_not() -> None:
    model = quantized(with_plugin(BERT, "compensated"))
    kinds = {name.split(".")[-2]: type(module) for name, module in model.named_modules() if name.endswith(".default")}
    assert kinds["variator_neuron_into"] is kinds["variator_neuron_out"] is DynamicLinear
    for part in ("variator_scorer", "variator_compensation_A", "variator_compensation_B"):
        assert kinds[part] is not DynamicLinear


def test_low_rank_updates_may_stay_apart(tmp_path: Path) -> None:
    """The base's own map then stays what it is, and W isn't rounded a second time."""
    plugin, inputs = with_plugin(BERT, "compensated"), inputs_of(BERT)
    plugin.save_pretrained(str(tmp_path))
    apart, summed = (PeftModel.from_pretrained(quantized(BERT.build()), str(tmp_path)).eval() for _ in range(2))
    quantize_plugin(apart, sum_updates=False)
    quantize_plugin(summed)
    maps = [module for module in apart.modules() if isinstance(module, CompensatedLinear)]
    assert maps
    assert not any(module.quantized for module in maps)
    assert not torch.equal(first(apart, inputs), first(summed, inputs))
    assert_close(apart, plugin, BERT.build(), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_plugin_is_saved_with_its_rounded_weights(form: str, tmp_path: Path) -> None:
    model, inputs = quantized(with_plugin(BERT, form)), inputs_of(BERT)
    quantize_plugin(model)
    model.save_pretrained(str(tmp_path))
    onto_float = PeftModel.from_pretrained(BERT.build(), str(tmp_path)).eval()
    assert_close(model, onto_float, BERT.build(), inputs)
    again = PeftModel.from_pretrained(quantized(BERT.build()), str(tmp_path)).eval()
    quantize_plugin(again)
    assert_close(again, model, BERT.build(), inputs)


@pytest.mark.parametrize("form", ["neurons", "rank", "shrunk"])
def test_half_precision_of_torch_too(form: str, tmp_path: Path) -> None:
    """Its weights are read, where a plugin adds to them, or copies some."""
    plugin, inputs = with_plugin(BERT, "neurons" if form == "shrunk" else form), inputs_of(BERT)
    if form == "shrunk":
        shrink_plugin(plugin)
    plugin.save_pretrained(str(tmp_path))
    fresh = get_peft_model(quantized(BERT.build(), torch.float16), VariatorConfig(correction_dim=16))
    assert any("variator_neuron_into" in name for name, _ in fresh.named_modules())
    model = PeftModel.from_pretrained(quantized(BERT.build(), torch.float16), str(tmp_path)).eval()
    with pytest.raises(TypeError, match="quantize='int8' has to be a function"):
        quantize_plugin(model, quantize="int8")  # type: ignore[arg-type]
    quantize_plugin(model)
    torch.testing.assert_close(first(model, inputs), first(plugin, inputs), rtol=0, atol=1e-2)


def test_a_second_plugin_and_transformers_own_loader(tmp_path: Path) -> None:
    plugin, inputs = with_plugin(BERT), inputs_of(BERT)
    plugin.save_pretrained(str(tmp_path))
    model = quantized(BERT.build())
    model.load_adapter(str(tmp_path))
    expected = first(model.eval(), inputs)
    other = quantized(with_plugin(BERT))
    other.load_adapter(str(tmp_path), "second")
    other.set_adapter("second")
    torch.testing.assert_close(first(other.eval(), inputs), expected)


def test_nothing_is_left_after_unload(tmp_path: Path) -> None:
    with_plugin(BERT).save_pretrained(str(tmp_path))
    base = quantized(BERT.build())
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    model = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    model(**inputs_of(BERT))[0].sum().backward()
    model.unload()
    after = {name: set(vars(module)) for name, module in base.named_modules()}
    assert {name: after[name] - before[name] for name in before} == {name: set() for name in before}


def test_weights_cannot_be_loaded_into_a_quantised_plugin() -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    plugin = with_plugin(BERT)
    state = get_peft_model_state_dict(plugin)
    with pytest.raises(ValueError, match="quantised"):
        set_peft_model_state_dict(quantized(plugin), state)


def test_a_base_that_is_not_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match="not quantised"):
        quantize_plugin(with_plugin(BERT))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("form", ["neurons", "compensated"])
def test_gradients_pass_the_quantised_base(form: str, half: bool) -> None:
    """Those of the plugin in the first layer, through all that follows, are those on the rounded base."""
    base = quantized(BERT.build())
    torch.manual_seed(1)
    model = get_peft_model(base, VariatorConfig(init_weights=False, **FORMS[form])).eval()
    plain = dequantized(model)
    gradients = []
    for each in (model, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = each(**inputs_of(BERT))[0].pow(2).sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if "variator_" in name})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        found = gradients[0][name]
        assert found is not None, name
        assert (found - expected).norm() < (0.6 if half else 0.3) * expected.norm() + 1e-6, name


def test_what_trains_forgets_the_sums(tmp_path: Path) -> None:
    with_plugin(BERT, "compensated").save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(quantized(BERT.build()), str(tmp_path)).eval()
    quantize_plugin(model)
    before = first(model, inputs_of(BERT))
    updates = [p for name, p in model.named_parameters() if "compensation_B" in name]
    for parameter in updates:
        parameter.requires_grad_(True)
    model(**inputs_of(BERT))[0].sum().backward()
    with torch.no_grad():
        for parameter in updates:
            parameter.zero_()
    assert (first(model, inputs_of(BERT)) - before).norm() > 0.05 * before.norm()


TORCHAO_FORMS = ["neurons", "rank", "compensated", "bottleneck"]


@pytest.mark.parametrize("form", TORCHAO_FORMS)
@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"])
def test_torchao_int8(name: str, form: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plugin, inputs = with_plugin(BERT, form), inputs_of(BERT)
    plugin.save_pretrained(str(tmp_path))
    base = BERT.build()
    torchao.quantize_(base, getattr(torchao, name)())
    base_first = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert_close(base_first, plugin, BERT.build(), inputs)
    alone = first(base_first, inputs)
    quantize_plugin(base_first)
    everything = copy.deepcopy(plugin)
    torchao.quantize_(everything, getattr(torchao, name)())
    quantize_plugin(everything)
    for model in (base_first, everything):
        assert_close(model, plugin, BERT.build(), inputs)
    assert not torch.equal(first(base_first, inputs), alone)
    base_first.save_pretrained(str(tmp_path))
    assert_close(PeftModel.from_pretrained(BERT.build(), str(tmp_path)).eval(), plugin, BERT.build(), inputs)
    base_first.set_compression_ratio(1)
    assert torch.equal(first(base_first, inputs), first(base, inputs))
    student = get_peft_model(base, VariatorConfig(init_weights=False, **FORMS[form])).eval()
    student(**inputs)[0].pow(2).sum().backward()
    gradients = {key: p.grad for key, p in student.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values()), gradients.keys()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao's int4 kernels of this version need CUDA")
def test_torchao_int4(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    case = replace(BERT, config={**BERT.config, "hidden_size": 128, "intermediate_size": 256})
    inputs = {name: value.cuda() for name, value in inputs_of(case).items()}
    plugin = with_plugin(case).to("cuda", torch.bfloat16)
    plugin.save_pretrained(str(tmp_path))
    base = case.build().to("cuda", torch.bfloat16)
    torchao.quantize_(base, torchao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert_close(model, plugin, case.build().to("cuda", torch.bfloat16), inputs)
    with pytest.raises(ValueError, match="quantize="):
        quantize_plugin(model)


def with_bitsandbytes(model: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> nn.Module:
    for module in list(model.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                linear = make(child)
                linear.load_state_dict(child.state_dict())
                setattr(module, name, linear)
    return model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' 4-bit kernels need CUDA")
def test_bitsandbytes_4bit(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    inputs = {name: value.cuda() for name, value in inputs_of(BERT).items()}
    plugin = with_plugin(BERT).cuda()
    plugin.save_pretrained(str(tmp_path))
    base = with_bitsandbytes(
        BERT.build(), lambda map: bitsandbytes.nn.Linear4bit(map.in_features, map.out_features, quant_type="nf4")
    )
    model = PeftModel.from_pretrained(base.cuda(), str(tmp_path)).eval()  # moving it quantises it
    assert_close(model, plugin, BERT.build().cuda(), inputs, share=0.5)
    with pytest.raises(ValueError, match="quantize="):
        quantize_plugin(model)


@pytest.mark.parametrize("form", FORMS)
def test_bitsandbytes_8bit(form: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plugin, inputs = with_plugin(BERT, form), inputs_of(BERT)
    plugin.save_pretrained(str(tmp_path))
    base = with_bitsandbytes(
        BERT.build(),
        lambda map: bitsandbytes.nn.Linear8bitLt(map.in_features, map.out_features, has_fp16_weights=False),
    )
    base.to("cpu")  # moving it quantises it
    if form == "rank":  # nothing gives its rows back
        with pytest.raises(ValueError, match="correction_rank=None"):
            PeftModel.from_pretrained(base, str(tmp_path))
        return
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert_close(model, plugin, BERT.build(), inputs)
    with pytest.raises(ValueError, match="quantize="):
        quantize_plugin(model)


@pytest.mark.parametrize("form", ["rank", "compensated"])
def test_quantised_sums_move_with_the_model(form: str, tmp_path: Path) -> None:
    with_plugin(BERT, form).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(quantized(BERT.build()), str(tmp_path)).eval()
    made = []

    def with_a_buffer(holder: nn.Module) -> None:
        for name, module in quantized(holder).named_children():
            holder.add_module(name, module)
            module.register_buffer("moved", torch.zeros(1))
            made.append(module)

    quantize_plugin(model, quantize=with_a_buffer)
    model.half()
    assert made
    assert all(module.moved.dtype == torch.float16 for module in made)


@pytest.mark.parametrize("form", ["neurons", "rank", "bottleneck"])
def test_corrections_that_stay_in_floating_point_are_named(form: str) -> None:
    """Those on a quantised network, until they are quantised, too."""
    assert float_corrections(with_plugin(BERT, form)) == []
    torch.manual_seed(1)
    base = quantized(BERT.build())
    model = get_peft_model(base, VariatorConfig(init_weights=False, **FORMS[form])).eval()
    assert float_corrections(model) == ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate"]
    quantize_plugin(model)
    assert float_corrections(model) == []


def test_a_base_whose_attention_alone_is_quantised() -> None:
    """Its maps with an update are quantised with it, and the networks and what is copied of them stay as they are."""
    torch.manual_seed(1)
    base = BERT.build()
    chosen = {name for name, module in base.named_modules() if "attention" in name and isinstance(module, nn.Linear)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(base, chosen, dtype=torch.qint8, inplace=True)
    alone, fields = copy.deepcopy(base), {"init_weights": False, "compression_ratio": 4}
    model = get_peft_model(base, VariatorConfig(**fields, **FORMS["compensated"])).eval()
    plain = dequantized(model)
    quantize_plugin(model)
    assert float_corrections(model) == []
    updated = {name: module for name, module in model.named_modules() if hasattr(module, "network_name")}
    assert {name for name, module in updated.items() if module.quantized} == {
        name for name in updated if "attention" in name
    }
    assert not any(isinstance(module, DynamicLinear) for name, module in model.named_modules() if "neuron" in name)
    assert_close(model, plain, alone, inputs_of(BERT))
    plugin = get_peft_model(copy.deepcopy(alone), VariatorConfig(**fields, **FORMS["neurons"])).eval()
    before = first(plugin, inputs_of(BERT))
    quantize_plugin(plugin)  # nothing of it has an update: there is nothing to do
    assert torch.equal(first(plugin, inputs_of(BERT)), before)
    with pytest.raises(ValueError, match="is not quantised"):
        quantize_plugin(with_plugin(BERT))


@pytest.mark.parametrize("form", ["neurons", "rank"])
@pytest.mark.parametrize(("case", "last"), [(BERT, r"layer\.\d\.output\.dense"), (LLAMA, "down_proj")])
def test_copies_of_a_map_that_the_base_has_in_floating_point_stay_there(case: Case, last: str, form: str) -> None:
    """The last map of a network that is int8 in part has inputs with outliers, and so has the plugin's."""
    torch.manual_seed(1)
    base = case.build()
    maps = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    chosen = {name for name in maps if not re.search(f"{last}$", name)}
    assert len(chosen) == len(maps) - 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(base, chosen, dtype=torch.qint8, inplace=True)
    alone = copy.deepcopy(base)
    model = get_peft_model(base, VariatorConfig(init_weights=False, compression_ratio=4, **FORMS[form])).eval()
    plain = dequantized(model)
    quantize_plugin(model)
    assert float_corrections(model) == []
    parts: dict[str, list[bool]] = {"variator_neuron_into": [], "variator_neuron_gate": [], "variator_neuron_out": []}
    for name, module in model.named_modules():
        for part in parts:
            if name.endswith(f"{part}.default"):
                quantised = bool(module.quantized) if form == "rank" else isinstance(module, DynamicLinear)
                parts[part].append(quantised)
    assert all(parts["variator_neuron_into"] + parts["variator_neuron_gate"])
    assert parts["variator_neuron_out"]
    assert not any(parts["variator_neuron_out"])
    inputs = inputs_of(case)
    assert_close(model, plain, alone, inputs)
    in_place = partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, inplace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_plugin(model, quantize=in_place)  # a function that is named quantises what is left, too
    outs = [module for name, module in model.named_modules() if name.endswith("variator_neuron_out.default")]
    assert all(module.quantized if form == "rank" else isinstance(module, DynamicLinear) for module in outs)


@pytest.mark.parametrize("outliers", [(), (3,), (0, 5, 30)])
def test_inputs_that_stand_out_run_beside_the_others(outliers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(32, 16)
    (rounded,) = quantized(nn.Sequential(plain)).children()
    assert isinstance(rounded, DynamicLinear)
    split = SplitDynamicLinear.of(rounded, plain.weight)
    inputs = torch.randn(4, 7, 32).abs()
    inputs[..., list(outliers)] *= 60
    expected = plain(inputs)
    errors = [(module(inputs) - expected).norm() / expected.norm() for module in (split, rounded)]
    assert errors[0] < 0.02
    if not outliers:
        assert torch.equal(split(inputs), rounded(inputs))
    alone = inputs.clone()
    alone[..., list(outliers)] = 0
    others = plain(alone) - plain.bias
    lost = [(module(inputs) - expected).norm() / others.norm() for module in (split, rounded)]
    assert lost[0] <= lost[1]
    if outliers:  # what is left of the others
        assert lost[0] < 0.1 * lost[1]
    assert split(inputs[:0]).shape == (0, 7, 16)
    assert copy.deepcopy(split)(inputs).equal(split(inputs))
    assert torch.equal(split.weight().dequantize(), rounded.weight().dequantize())


def test_features_that_stand_out_are_few() -> None:
    """More than may stand out do not: then it is the others that are small."""
    torch.manual_seed(0)
    plain = nn.Linear(32, 16)
    (rounded,) = quantized(nn.Sequential(plain)).children()
    split = SplitDynamicLinear.of(cast(DynamicLinear, rounded), plain.weight)
    inputs = torch.rand(5, 32)
    inputs[:, :9] += 100
    assert torch.equal(split(inputs), rounded(inputs))
    narrow = nn.Linear(8, 4)
    (rounded,) = quantized(nn.Sequential(narrow)).children()
    inputs = torch.tensor([[100.0, 1, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(SplitDynamicLinear.of(cast(DynamicLinear, rounded), narrow.weight)(inputs), rounded(inputs))


@pytest.mark.parametrize("form", ["neurons", "rank", "compensated"])
@pytest.mark.parametrize("order", ["plugin on int8", "int8 over both"])
def test_copied_neurons_that_stand_out_do_not_drown_the_others(form: str, order: str) -> None:
    """One neuron of a network is far larger than all others, as in all-mpnet-base-v2, and is copied for that."""
    torch.manual_seed(1)
    base = BERT.build()
    with torch.no_grad():
        for layer in base.encoder.layer:
            layer.intermediate.dense.bias[5] = 60
            layer.intermediate.dense.weight[5] *= 5
    fields = VariatorConfig(compression_ratio=4, **FORMS[form] | {"correction_dim": 24})
    if order == "plugin on int8":
        model = get_peft_model(quantized(base), fields).eval()
    else:
        model = quantized(get_peft_model(base, fields).eval())
    quantize_plugin(model)
    outs = [
        module.quantized["rows"] if form == "rank" else module
        for name, module in model.named_modules()
        if name.endswith("variator_neuron_out.default")
    ]
    assert [type(module) for module in outs] == [SplitDynamicLinear] * 2
    inputs = inputs_of(BERT)
    real, found = inputs["attention_mask"].bool(), []
    forwards: list[Callable[[SplitDynamicLinear, Tensor], Tensor]] = [
        lambda module, tokens: nn.functional.linear(tokens, module.columns),
        SplitDynamicLinear.forward,
        DynamicLinear.forward,
    ]
    for forward in forwards:
        for module in outs:
            module.forward = partial(forward, module)
        found.append(first(model, inputs)[real])
    exact, split, whole = found
    # Without updates the base's own networks, which round them too, make more of what differs.
    assert (split - exact).norm() < (0.3 if form == "compensated" else 0.8) * (whole - exact).norm()
    quantize_plugin(model)  # again: what is split stays so
    assert all(type(module) is SplitDynamicLinear for module in outs)


def test_networks_run_in_floating_point_on_merged_rows() -> None:
    """Where the base rounds what comes in, and unless they are asked not to."""
    torch.manual_seed(1)
    base = quantized(BERT.build())
    model = get_peft_model(
        base, VariatorConfig(init_weights=False, compression_ratio=4, **FORMS["compensated"])
    ).eval()
    for float_rows in (True, False):
        quantize_plugin(model, float_rows=float_rows)
        kinds = {
            name.partition("layer.0.")[2]: type(module.quantized["default"])
            for name, module in model.named_modules()
            if hasattr(module, "network_name") and "layer.0." in name
        }
        of_network = {kind for name, kind in kinds.items() if "attention" not in name}
        assert of_network == {nn.Linear if float_rows else DynamicLinear}
        assert {kind for name, kind in kinds.items() if "attention" in name} == {DynamicLinear}
    half = get_peft_model(quantized(BERT.build(), torch.float16), VariatorConfig(**FORMS["compensated"])).eval()
    quantize_plugin(half)  # float16 weights round nothing that comes in
    assert all(
        isinstance(module.quantized["default"], DynamicLinear)
        for module in half.modules()
        if hasattr(module, "network_name")
    )
