"""`decompression="neurons"`: a narrow copy of the network gives each token of a group what is its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_variator import VariatorConfig, allocate, calibrate
from peft_variator.profiling import count_flops
from peft_variator.tuners.variator import merging
from peft_variator.tuners.variator.base_reading import read_base
from tests.tiny_models import ALL, BERT, LLAMA, Case, by_name

from .reference import (
    assert_same,
    assert_the_plugin_alone_learns,
    feed_forward_of,
    first,
    kept_ends,
    layers_of,
    text_groups,
    watch,
)


T5_GATED = next(case for case in ALL if case.name == "flan-t5")
GPT2 = next(case for case in ALL if case.name == "gpt2")
MODERNBERT = next(case for case in ALL if case.name == "modernbert")
PHI3 = next(case for case in ALL if case.name == "phi3")
VIT = next(case for case in ALL if case.name == "vit")
FORMS = [BERT, LLAMA, T5_GATED, GPT2, MODERNBERT, PHI3, VIT]
EXPERTS = [case for case in ALL if case.has_experts]
DENSE = [case for case in ALL if not case.has_experts]


def with_neurons(case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(case.build(), VariatorConfig(decompression="neurons", **fields)).eval()


@pytest.mark.parametrize("form", ["added", "sliced"])
@pytest.mark.parametrize("ratio", [2, 4, 64])
@pytest.mark.parametrize("case", DENSE, ids=by_name)
def test_at_the_whole_width_the_untrained_plugin_is_the_base(case: Case, ratio: int, form: str) -> None:
    model = with_neurons(case, correction_dim=1.0, compression_ratio=ratio, correction_form=form)
    inputs, base = case.inputs(2, 12), case.build()
    assert {layer.decompressions["default"] for layer in layers_of(model)} == {"neurons"}
    torch.testing.assert_close(first(model, inputs), first(base, inputs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_the_base_bit_for_bit_at_one(case: Case) -> None:
    model, inputs = with_neurons(case, correction_dim=8, init_weights=False), case.inputs(2, 12)
    assert not torch.equal(first(model, inputs), first(case.build(), inputs))
    model.set_compression_ratio(1)
    assert torch.equal(first(model, inputs), first(case.build(), inputs))


@pytest.mark.parametrize("case", [BERT, LLAMA, T5_GATED, GPT2], ids=by_name)
def test_against_a_loop_over_tokens(case: Case) -> None:
    """y = F(m) + Σ_{j∈S} v_j·(a_j(x) − a_j(m)), with trained copies."""
    model, inputs = with_neurons(case, correction_dim=5, init_weights=False), case.inputs(2, 13)
    seen = watch(model, lambda: first(model, inputs))
    for each in seen:
        network, layer = feed_forward_of(model, each), each.layer
        parts = layer.modules_of("default")

        def neurons(vector: Tensor, parts: dict[str, nn.Module] = parts) -> Tensor:
            activated = parts["variator_neurons"](parts["variator_neuron_into"](vector))
            gate = parts.get("variator_neuron_gate")
            return activated if gate is None else activated * gate(vector)

        expected = torch.zeros_like(each.inputs)
        scorer = layer.variator_scorer["default"]
        for index, sequence in enumerate(each.inputs):
            kept = kept_ends([True] * 13, 1, 1)
            for group in text_groups([True] * 13, kept, 4):
                members = [sequence[position] for position in group]
                weights = torch.softmax(torch.cat([scorer(member) for member in members]), 0)
                merged = sum(weight * member for weight, member in zip(weights, members, strict=True))
                for position, member in zip(group, members, strict=True):
                    expected[index, position] = network(merged)
                    if len(group) > 1:
                        difference = neurons(member) - neurons(merged)
                        expected[index, position] += parts["variator_neuron_out"](difference)
        torch.testing.assert_close(each.outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_padding_changes_nothing(case: Case) -> None:
    model, inputs = with_neurons(case, correction_dim=8, init_weights=False), case.inputs(1, 9)
    padded = {"input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 4))}
    padded["attention_mask"] = (torch.arange(13) < 9).long().unsqueeze(0)
    torch.testing.assert_close(first(model, padded)[:, :9], first(model, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("form", ["added", "sliced"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_copies_run_for_merged_tokens_alone_where_these_are_few(
    case: Case, rank: int | None, form: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"correction_rank": rank, "correction_form": form}
    if not padded:
        fields |= {"keep_first_tokens": 7}
    model = with_neurons(case, correction_dim=8, init_weights=False, **fields)
    inputs = {name: value[:, :24] for name, value in case.inputs(3, 24).items()}
    inputs["attention_mask"] = (torch.arange(24) < torch.tensor([[24], [6], [1]])).long()
    if not padded:
        inputs["attention_mask"].fill_(1)
    found = []
    for share in (0.8, 0.0):
        monkeypatch.setattr(merging, "GATHERED_SHARE", share)
        output = model(**inputs)[0]
        model.zero_grad()
        (output * inputs["attention_mask"].unsqueeze(-1)).square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append(([output.detach()[inputs["attention_mask"].bool()], *gradients], count_flops(model, inputs)))
    (gathered, fewer), (whole, more) = found
    assert fewer < more
    for one, other in zip(gathered, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    model, inputs = with_neurons(case, correction_dim=0.25, init_weights=False), case.inputs(2, 12)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["decompression"], saved["correction_dim"]) == ("neurons", 0.25)
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), adapter_name=name)
        assert torch.equal(first(loaded.eval(), inputs), first(model, inputs))


def test_every_copy_learns_and_no_base_weight() -> None:
    for case in (BERT, LLAMA):
        model = with_neurons(case, correction_dim=8).train()
        assert_the_plugin_alone_learns(model, case)


@pytest.mark.parametrize("case", EXPERTS, ids=by_name)
def test_experts_take_the_bottleneck_and_say_so(case: Case) -> None:
    with pytest.warns(UserWarning, match="bottleneck") as warned:
        model = with_neurons(case, correction_dim=8)
    assert len([each for each in warned if "bottleneck" in str(each.message)]) == 1
    first(model, case.inputs(2, 12))


class Quantised(nn.Module):
    """A linear map in eight bits, as libraries have them: it can be called, and has no weight to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("values", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.values * self.scale, self.bias)


def quantised(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Quantised(child))
    return model


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_a_quantised_base_takes_a_saved_plugin(case: Case, tmp_path: Path) -> None:
    model, inputs = with_neurons(case, correction_dim=16), case.inputs(2, 12)
    model.save_pretrained(tmp_path)
    base = first(quantised(case.build()), inputs)
    loaded = PeftModel.from_pretrained(quantised(case.build()), str(tmp_path)).eval()
    assert {layer.decompressions["default"] for layer in layers_of(loaded)} == {"neurons"}
    found, expected = first(loaded, inputs), first(model, inputs)
    assert (found - expected).norm() < 0.2 * (found - base).norm()
    with pytest.warns(UserWarning, match="bottleneck"):
        get_peft_model(quantised(case.build()), VariatorConfig(decompression="neurons"))


def test_one_graph() -> None:
    torch.compiler.reset()
    model, inputs = with_neurons(BERT, correction_dim=8, init_weights=False), BERT.inputs(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled, inputs), first(model, inputs), rtol=0, atol=1e-5)


# The configuration


def test_widths() -> None:
    assert {layer.variator_neurons["default"].index.numel() for layer in layers_of(with_neurons(BERT))} == {48 // 4}
    for width, expected in ((3, 3), (0.5, 24), (1.0, 48), (1, 1)):
        model = with_neurons(BERT, correction_dim=width)
        assert {layer.variator_neuron_into["default"].out_features for layer in layers_of(model)} == {expected}


@pytest.mark.parametrize("width", [0, -1, 0.0, 1.5, -0.1, float("nan"), "8", True])
def test_what_is_no_width_is_refused(width: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="correction_dim"):
        VariatorConfig(decompression="neurons", correction_dim=width)


def test_more_neurons_than_there_are_are_refused_before_anything_changes() -> None:
    base = BERT.build()
    with pytest.raises(ValueError, match="correction_dim=49"):
        get_peft_model(base, VariatorConfig(decompression="neurons", correction_dim=49))
    assert not layers_of(base)


def test_a_width_belongs_to_its_decompression() -> None:
    assert VariatorConfig(correction_dim=8).decompression == "neurons"
    assert VariatorConfig(correction_dim=8, decompression="bottleneck").bottleneck_dim == 8
    with pytest.raises(ValueError, match="decompression='else'"):
        VariatorConfig(decompression="else")


# Which neurons


def test_without_data_the_strongest_are_copied() -> None:
    model = with_neurons(LLAMA, correction_dim=6)
    for layer in layers_of(model):
        mlp = layer.base_layer
        strength = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
        index = layer.variator_neurons["default"].index
        assert set(index.tolist()) == set(strength.topk(6).indices.tolist())
        assert torch.equal(layer.variator_neuron_gate["default"].weight, mlp.up_proj.weight[index])


def test_calibration_takes_those_that_vary_most_inside_of_groups() -> None:
    model = with_neurons(BERT, correction_dim=6, keep_last_tokens=0)
    batches = [BERT.inputs(2, 13, seed) for seed in range(3)]
    base, inputs = BERT.build(), {}
    for block in base.encoder.layer:
        block.intermediate.register_forward_pre_hook(
            lambda module, args: inputs.setdefault(module, []).extend(args[0].unbind(0))
        )
    with torch.no_grad():
        for batch in batches:
            base(**batch)
        expected = []
        for block in base.encoder.layer:
            spread = torch.zeros(block.intermediate.dense.out_features)
            for sequence in inputs[block.intermediate]:
                for group in sequence[1:].split(4):
                    mean = group.mean(0, keepdim=True)
                    difference = block.intermediate.forward(group) - block.intermediate.forward(mean)
                    spread += difference.square().sum(0) * block.output.dense.weight.square().sum(0)
            expected.append(set(spread.topk(6).indices.tolist()))
    calibrate(model, iter(batches))
    found = [set(layer.variator_neurons["default"].index.tolist()) for layer in layers_of(model)]
    assert found == expected
    for layer in layers_of(model):
        index = layer.variator_neurons["default"].index
        assert torch.equal(layer.variator_neuron_into["default"].weight, layer.base_layer.dense.weight[index])


def test_a_calibrated_choice_is_saved(tmp_path: Path) -> None:
    model, inputs = with_neurons(LLAMA, correction_dim=6), LLAMA.inputs(2, 13)
    calibrate(model, [LLAMA.inputs(2, 13, seed) for seed in range(2)])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), str(tmp_path)).eval()
    assert torch.equal(first(loaded, inputs), first(model, inputs))


def test_what_cannot_be_calibrated_is_refused() -> None:
    trained = with_neurons(BERT, correction_dim=6)
    with torch.no_grad():
        layers_of(trained)[1].variator_neuron_out["default"].weight.add_(1)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with pytest.raises(ValueError, match="has been trained"):
        calibrate(trained, [BERT.inputs()])
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    with pytest.raises(ValueError, match="decompression='neurons'"):
        calibrate(get_peft_model(BERT.build(), VariatorConfig(bottleneck_dim=8)), [BERT.inputs()])
    for batches in ([], [BERT.inputs(1, 2)]):
        with pytest.raises(ValueError, match="no tokens that are merged"):
            calibrate(with_neurons(BERT, correction_dim=6), batches)
    ids = LLAMA.inputs(2, 12)["input_ids"]
    with pytest.raises(ValueError, match="leave labels out"):
        calibrate(with_neurons(LLAMA, correction_dim=6), [{"input_ids": ids, "labels": ids}])
    with pytest.raises(TypeError, match="batch of type Tensor"):
        calibrate(with_neurons(LLAMA, correction_dim=6), [ids])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="batch of type Tensor"):
        allocate(LLAMA.build(), [ids])  # type: ignore[list-item]


LOW_RANK = {"correction_rank": 2, "correction_dim": 8}


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_a_low_rank_update_starts_as_the_copies_whole(case: Case) -> None:
    inputs = case.inputs(2, 12)
    whole, update = with_neurons(case, correction_dim=8), with_neurons(case, **LOW_RANK)
    torch.testing.assert_close(first(update, inputs), first(whole, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_a_low_rank_update_is_saved_alone_and_loaded(case: Case, tmp_path: Path) -> None:
    """The neurons that calibration chose come from the file, their weights from the base, for every way of loading."""
    model, inputs = with_neurons(case, init_weights=False, **LOW_RANK), case.inputs(2, 12)
    for layer in layers_of(model):  # other neurons than a fresh plugin would choose
        neurons = layer.variator_neurons["default"]
        neurons.index.copy_(torch.arange(neurons.index.numel()) * 2 + 1)
        read_base(layer, "default", again=True)
    expected = first(model, inputs)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("rows" in name or "variator_neuron_into.weight" in name for name in names)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert_same(first(loaded, inputs), expected)
    again = with_neurons(case, **LOW_RANK)
    again.load_adapter(str(tmp_path), "second")
    again.set_adapter("second")
    assert_same(first(again, inputs), expected)
    base = case.build()
    base.load_adapter(str(tmp_path))
    assert_same(first(base.eval(), inputs), expected)
    assert_same(first(copy.deepcopy(loaded), inputs), expected)


def test_a_low_rank_update_learns_and_nothing_else() -> None:
    for case in (BERT, LLAMA):
        model = with_neurons(case, **LOW_RANK).train()
        rows = [layer.variator_neuron_into["default"].rows.clone() for layer in layers_of(model)]
        assert_the_plugin_alone_learns(model, case)
        for layer, row in zip(layers_of(model), rows, strict=True):
            assert torch.equal(layer.variator_neuron_into["default"].rows, row)


def _by_data(copies: Any) -> None:
    copies.train()
    copies.B.data.mul_(2)
    copies.eval()


@pytest.mark.parametrize(
    "write",
    [
        lambda copies: copies.A.detach().add_(1),
        lambda copies: copies.load_state_dict({name: value + 1 for name, value in copies.state_dict().items()}),
        lambda copies: setattr(copies, "B", nn.Parameter(copies.B.detach() * 3)),
        lambda copies: copies.set_rows(copies.rows + 1),
        lambda copies: copies.double(),
        lambda copies: copies.bfloat16(),
        _by_data,
    ],
    ids=["in place", "loaded", "replaced", "other rows", "float64", "bfloat16", "by data and another mode"],
)
def test_the_sum_of_a_low_rank_update_is_kept_until_something_is_written(write: Any) -> None:
    copies = layers_of(with_neurons(BERT, init_weights=False, **LOW_RANK))[0].variator_neuron_into["default"]
    with torch.inference_mode():
        kept = copies.weight
        assert copies.weight is kept
    with torch.no_grad():
        assert copies.weight is kept
        write(copies)
        expected = torch.addmm(copies.rows.to(copies.B.dtype), copies.B, copies.A)
        torch.testing.assert_close(copies.weight, expected)
        assert not torch.equal(copies.weight.double(), kept.double())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert copies.weight.dtype is (copies.B @ copies.A).dtype
    assert copies.weight.requires_grad
    torch.testing.assert_close(copies.weight.detach(), expected)


def test_calibration_chooses_the_rows_of_a_low_rank_update() -> None:
    model, whole = with_neurons(BERT, **LOW_RANK), with_neurons(BERT, correction_dim=8)
    batches = [BERT.inputs(4, 16, seed) for seed in range(2)]
    for each in (model, whole):
        calibrate(each, batches)
    inputs = BERT.inputs(2, 12)
    torch.testing.assert_close(first(model, inputs), first(whole, inputs), rtol=0, atol=1e-6)


def test_another_base_under_a_low_rank_update() -> None:
    """Loading a whole state reads the rows anew."""
    model, inputs = with_neurons(BERT, init_weights=False, **LOW_RANK), BERT.inputs(2, 12)
    state = {
        n: v.clone() if "variator" in n else v * 1.1 for n, v in model.state_dict().items() if v.is_floating_point()
    }
    model.load_state_dict(state, strict=False)
    again = with_neurons(BERT, init_weights=False, **LOW_RANK)
    for layer in layers_of(model):
        weight = layer.network().into_rows(layer.variator_neurons["default"].index)[0]
        assert torch.equal(layer.variator_neuron_into["default"].rows, weight)
    assert not torch.equal(first(again, inputs), first(model, inputs))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_low_rank_update_over_a_quantised_base() -> None:
    model, inputs = with_neurons(BERT, **LOW_RANK), BERT.inputs(2, 12)
    quantised = torch.ao.quantization.quantize_dynamic(BERT.build().eval(), {nn.Linear}, dtype=torch.qint8)
    over = get_peft_model(quantised, VariatorConfig(decompression="neurons", **LOW_RANK)).eval()
    torch.testing.assert_close(first(over, inputs), first(model, inputs), rtol=0, atol=0.2)
    for one, other in zip(layers_of(over), layers_of(model), strict=True):
        same = one.network().into_rows(torch.arange(4))[0], other.network().into_rows(torch.arange(4))[0]
        torch.testing.assert_close(*same, rtol=0, atol=0.01)
        assert one.decompressions == {"default": "neurons"}


def test_widths_and_ranks_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="correction_rank"):
        VariatorConfig(decompression="bottleneck", correction_rank=4)
    for rank in (0, True, 1.5, "4"):
        with pytest.raises(ValueError, match="correction_rank"):
            VariatorConfig(decompression="neurons", correction_rank=rank)


def test_a_low_rank_update_and_a_compensation_compiled_and_exported() -> None:
    model, inputs = with_neurons(BERT, init_weights=False, compensation_rank=2, **LOW_RANK), BERT.inputs(2, 12)
    with torch.no_grad():
        expected = next(iter(model(**inputs).values()))
        compiled = torch.compile(model, fullgraph=True, dynamic=True)(**inputs)
        exported = torch.export.export(model, (), inputs).module()(**inputs)
    torch.testing.assert_close(next(iter(compiled.values())), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(next(iter(exported.values())), expected, rtol=0, atol=1e-5)
