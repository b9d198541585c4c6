"""A plugin whose copied neurons are kept as rounded differences from the base model's."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, load_checkpoint_in_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_variator import VariatorConfig, calibrate, fold_updates, quantize_plugin, shrink_plugin
from peft_variator.cli.shrink import in_half_precision
from peft_variator.offloading import is_offloading
from peft_variator.tuners.variator import base_reading
from peft_variator.tuners.variator.compensation import CompensatedLinear
from peft_variator.tuners.variator.layer import plugin_layers
from peft_variator.tuners.variator.linear_maps import BLOCK, RoundedFactor, RoundedRows
from tests.tiny_models import BY_NAME, Case, by_name


CASES = [BY_NAME[name] for name in ("bert", "llama", "gpt2", "phi3", "vit")]
FIELDS: dict[str, Any] = {"decompression": "neurons", "correction_dim": 8, "compensation_rank": 2}


def trained(case: Case, **fields: Any) -> Any:
    """A plugin whose weights have left their start by a little, as by training."""
    model = get_peft_model(case.build(), VariatorConfig(**FIELDS | fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "variator_" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def copies(model: nn.Module) -> list[tuple[str, Any]]:
    parts = ("variator_neuron_into", "variator_neuron_gate", "variator_neuron_out")
    return [
        (f"{layer.name}.{part}", module)
        for layer in plugin_layers(model)
        for part, module in layer.modules_of(layer.active_plugin or "default").items()
        if part in parts
    ]


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values()))


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """What the same numbers give at another place in memory: some processors sum in another order there."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def rounded_plainly(difference: Tensor, bits: int) -> Tensor:
    """The reference: block by block and number by number."""
    numbers, half = difference.flatten().tolist(), 2 ** (bits - 1)
    found: list[float] = []
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK]
        scale = float(torch.tensor(max(map(abs, block)) / (half - 0.5)).half())
        found += [min(max(round(x / scale), -half), half - 1) * scale if scale else 0.0 for x in block]
    return torch.tensor(found).view_as(difference)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.sampled_from((4, 8)),
    size=st.sampled_from((0.0, 1e-9, 1e-4, 0.02, 3.0)),
    seed=st.integers(0, 99),
)
def test_rounding_against_the_plainest(rows: int, columns: int, bits: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator).double().float()
    difference = size * torch.randn(rows, columns, generator=generator)
    module = RoundedRows(columns, rows, bits, bias=False)
    module.set_weight(base + difference, base)
    wanted = rounded_plainly((base + difference) - base, bits)
    torch.testing.assert_close(module.weight, base + wanted, rtol=0, atol=1e-6 * (1 + size))
    # Half a step at most, of which there are 2 ** bits − 1 over twice the largest number of the block; and up to
    # 2 ** (bits − 1) times what half precision rounds a step by, half a unit of its 11 bits or of its smallest number.
    largest, half = float(difference.abs().max()), 2 ** (bits - 1)
    bound = 0.5 * largest / (half - 0.5) + largest * 2**-11 + half * 2**-25
    assert float((module.weight - base - difference).abs().max()) <= 1.01 * bound + 1e-6
    assert module.difference.numel() == -(-rows * columns // BLOCK) * BLOCK * bits // 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_it_is_saved_small_and_loaded_every_way(case: Case, bits: int, tmp_path: Path) -> None:
    model, inputs = trained(case), case.inputs(2, 12)
    whole = first(model, inputs)
    before = {name: module.weight.detach().clone() for name, module in copies(model)}
    model.save_pretrained(tmp_path / "whole")
    shrink_plugin(model, bits)
    for name, module in copies(model):
        assert isinstance(module, RoundedRows)
        # The differences are of 0.02 times a normal number, and half a step is 1/15 or 1/255 of the largest.
        assert 0 < float((module.weight - before[name]).abs().max()) < 0.02 * 5 / (2**bits - 1)
    small = first(model, inputs)
    assert not torch.equal(small, whole)
    if bits == 8:
        torch.testing.assert_close(small, whole, rtol=0.02, atol=0.02)
    model.save_pretrained(tmp_path / "small")
    kept = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert not any("variator_neuron_into.weight" in key or "summed" in key for key in kept)
    bytes_of = {
        folder: sum(
            value.nbytes
            for key, value in load_file(tmp_path / folder / "adapter_model.safetensors").items()
            if "variator_neuron_" in key and not key.endswith(("bias", "fingerprint"))
        )
        for folder in ("whole", "small")
    }
    assert bytes_of["small"] <= bytes_of["whole"] * (bits / 32 + 1 / BLOCK) + 300  # blocks that are not full
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            case.build(), str(tmp_path / "small"), low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert_near(first(loaded, inputs), small)
        weights = {name: module.weight for name, module in copies(loaded)}
        assert_alike(weights, {name: module.weight for name, module in copies(model)})
    assert loaded.peft_config["default"].correction_bits == bits
    base = case.build()
    base.load_adapter(str(tmp_path / "small"))
    assert_near(first(base.eval(), inputs), small)
    assert_near(first(copy.deepcopy(loaded), inputs), small)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert_alike(again, kept)
    loaded.set_compression_ratio(1)
    with loaded.disable_adapter():
        plain = first(loaded, inputs)
    assert torch.equal(first(loaded, inputs), plain)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 9),
    width=st.integers(1, 70),
    is_up=st.booleans(),
    size=st.sampled_from((0.0, 1e-9, 1e-4, 0.02, 3.0)),
    seed=st.integers(0, 99),
)
def test_rounding_of_a_factor_against_the_plainest(rank: int, width: int, is_up: bool, size: float, seed: int) -> None:
    weight = size * torch.randn(
        (width, rank) if is_up else (rank, width), generator=torch.Generator().manual_seed(seed)
    )
    factor = RoundedFactor(weight.shape[1], weight.shape[0], is_up=is_up)
    factor.set_weight(weight)
    directions = weight.T.tolist() if is_up else weight.tolist()
    found = []
    for numbers in directions:
        scale = float(torch.tensor(max(map(abs, numbers)) / 127).half())
        found.append([min(max(round(x / scale), -127), 127) * scale if scale else 0.0 for x in numbers])
    expected = torch.tensor(found).T if is_up else torch.tensor(found)
    # Where a number lies half way between two steps, the quotient may be rounded either way.
    step = torch.tensor([[max(map(abs, numbers)) / 127] for numbers in directions])
    assert bool(((factor.weight - expected).abs() <= 1.01 * (step.T if is_up else step) + 1e-7).all())
    assert ((factor.weight - expected).abs() > 1e-6 + 1e-3 * size / 127).float().mean() <= 0.02


def test_compensation_is_rounded_with_the_copies(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    model, inputs = trained(case, correction_dim=1.0), case.inputs(2, 12)
    around = [module for module in model.modules() if isinstance(module, CompensatedLinear)]
    before = [module.factors("default") for module in around]
    shrink_plugin(model, 8)
    for module, factors in zip(around, before, strict=True):
        for weight, was, dim in zip(module.factors("default"), factors, (1, 0), strict=True):
            assert not torch.equal(weight, was)
            assert bool(((weight - was).abs() <= 0.51 * was.abs().amax(dim, keepdim=True) / 127 + 1e-6).all())
    expected = first(model, inputs)
    model.save_pretrained(tmp_path)
    kept = {key: value for key, value in load_file(tmp_path / "adapter_model.safetensors").items() if "compen" in key}
    assert {key.rsplit(".", 1)[1] for key in kept} == {"numbers", "scales"}
    assert all(value.dtype == torch.int8 for key, value in kept.items() if key.endswith("numbers"))
    loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), is_trainable=False).eval()
    assert loaded.peft_config["default"].compensation_bits == 8
    # What a call kept follows what is written later, and stays out of the way of a gradient.
    with torch.inference_mode():
        loaded(**inputs)
        for module in loaded.modules():
            if isinstance(module, RoundedFactor):
                module.numbers.zero_()
    assert not torch.equal(first(loaded, inputs), expected)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(first(loaded, inputs), expected)
    next(iter(loaded.requires_grad_(True)(**inputs).values())).sum().backward()


def test_a_plugin_without_compensation_has_none_rounded(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    model = trained(case, compensation_rank=None)
    shrink_plugin(model)
    assert model.peft_config["default"].compensation_bits is None
    for fields, message in (({"compensation_bits": 4}, "has to be 8"), ({"compensation_rank": None}, "without comp")):
        with pytest.raises(ValueError, match=message):
            VariatorConfig(**FIELDS | {"compensation_bits": 8} | fields)
    with pytest.raises(ValueError, match="shrink_plugin"):
        get_peft_model(case.build(), VariatorConfig(**FIELDS, compensation_bits=8))


def test_beside_a_plugin_that_is_whole(tmp_path: Path) -> None:
    """Its neighbour stays as it is."""
    case = BY_NAME["bert"]
    model, inputs = trained(case), case.inputs(2, 12)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "other")
    whole = first(model, inputs)
    shrink_plugin(model, 4, "other")
    assert torch.equal(first(model, inputs), whole)
    assert model.peft_config["default"].correction_bits is None
    model.set_adapter("other")
    assert not torch.equal(first(model, inputs), whole)
    assert all(isinstance(module, RoundedRows) for _, module in copies(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_bases_of_every_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    model, inputs = trained(case), case.inputs(2, 12)
    shrink_plugin(model)
    expected = first(model, inputs)
    model.save_pretrained(tmp_path)
    # In half precision the whole model differs, by 0.01 in the mean and what the largest is depends on the machine.
    most, mean = (2e-5, 2e-6) if dtype == torch.float32 else (0.1, 0.015)
    loaded = PeftModel.from_pretrained(case.build().to(dtype), str(tmp_path)).eval()
    for each in (loaded, model.to(dtype)):
        error = (first(each, inputs).float() - expected).abs()
        assert float(error.max()) <= most
        assert float(error.mean()) <= mean
    whole = trained(case).to(dtype)
    reference = first(whole, inputs)
    shrink_plugin(whole, 8)
    error = (first(whole, inputs).float() - reference.float()).abs()
    assert float(error.max()) <= 0.1
    assert float(error.mean()) <= 0.015


def test_forms_folds_and_compiled_code() -> None:
    case = BY_NAME["bert"]
    inputs = case.inputs(2, 12)
    for form in ("added", "sliced"):
        model = trained(case, correction_form=form)
        shrink_plugin(model, 8)
        expected = first(model, inputs)
        folded = fold_updates(model)
        assert not any(isinstance(module, RoundedRows) for module in folded.modules())
        torch.testing.assert_close(first(folded, inputs), expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, dynamic=True)(**inputs)
        torch.testing.assert_close(next(iter(compiled.values())), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_over_a_quantised_base(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    model, inputs = trained(case), case.inputs(2, 12)
    shrink_plugin(model)
    expected = first(model, inputs)
    model.save_pretrained(tmp_path)
    base = torch.ao.quantization.quantize_dynamic(case.build().eval(), {nn.Linear}, dtype=torch.qint8)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(first(loaded, inputs), expected, rtol=0, atol=0.3)
    quantize_plugin(loaded)
    assert all(module.quantized for _, module in copies(loaded))
    torch.testing.assert_close(first(loaded, inputs), expected, rtol=0, atol=0.3)
    loaded.save_pretrained(tmp_path / "again")  # the rounded differences, as they were
    kept, again = (load_file(each / "adapter_model.safetensors") for each in (tmp_path, tmp_path / "again"))
    assert_alike(again, kept)


def test_what_can_t_be_shrunk_is_left_as_it_was(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    model = trained(case)
    for bits in (0, 2, 16, True, "4", None, 4.5, 4.0):
        with pytest.raises(ValueError, match=r"bits=.* has to be 4 or 8"):
            shrink_plugin(model, bits)
        with pytest.raises((ValueError, TypeError), match="correction_bits"):
            VariatorConfig(**FIELDS, correction_bits=bits or 3)
    with pytest.raises(ValueError, match="no adapter|no plugin|other"):
        shrink_plugin(model, 4, "other")
    bottleneck = get_peft_model(case.build(), VariatorConfig(bottleneck_dim=4))
    with pytest.raises(ValueError, match="copies no neurons"):
        shrink_plugin(bottleneck)
    ranked = trained(case, correction_rank=2)
    with pytest.raises(ValueError, match="whole copies"):
        shrink_plugin(ranked)
    assert ranked.peft_config["default"].correction_bits is None
    shrink_plugin(model)
    with pytest.raises(ValueError, match="whole copies"):
        shrink_plugin(model)
    with pytest.raises(ValueError, match="has been trained"):
        calibrate(model, [case.inputs()])
    with pytest.raises(ValueError, match="shrink_plugin"):
        get_peft_model(case.build(), VariatorConfig(**FIELDS, correction_bits=4))
    with pytest.raises(ValueError, match="low rank"):
        VariatorConfig(decompression="neurons", correction_rank=2, correction_bits=4)
    with pytest.raises(ValueError, match="correction_bits=4 belongs to"):
        VariatorConfig(decompression="bottleneck", correction_bits=4)


def test_training_one_on_warns(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    model = trained(case)
    shrink_plugin(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(case.build(), str(tmp_path))
    with pytest.warns(UserWarning, match="correction_bits=4: .* will not be trained"):
        loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), is_trainable=True)
    trains = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert any("variator_scorer" in name for name in trains)
    assert not any("difference" in name or "scales" in name for name in trains)


def test_configurations_that_others_have_too_stay() -> None:
    case, config = BY_NAME["bert"], VariatorConfig(**FIELDS)
    model = get_peft_model(case.build(), config)
    model.add_adapter("other", config)
    another = get_peft_model(case.build(), config)
    shrink_plugin(model, 4, "default")
    assert config.correction_bits is None
    assert [model.peft_config[name].correction_bits for name in ("default", "other")] == [4, None]
    assert another.peft_config["default"].correction_bits is None
    get_peft_model(case.build(), config)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_numbers_of_neurons_in_few_bits(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """As in a file that the command writes."""
    case = BY_NAME["bert"]
    model, inputs = trained(case, correction_form="sliced"), case.inputs(2, 12)
    shrink_plugin(model, 8)
    expected = first(model, inputs)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(in_half_precision(load_file(file)), file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(first(loaded, inputs), expected, rtol=0, atol=0.01)


READING: list[dict[str, Any]] = [{}, {"correction_rank": 2}]


@pytest.mark.parametrize("fields", READING, ids=["shrunk", "rank"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_under_a_lora_that_is_merged_or_not(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """What is added to the base's rows is added to those without the LoRA, whenever they are read."""
    case, targets = BY_NAME[name], ["dense"] if name == "bert" else ["gate_proj", "up_proj", "down_proj"]

    def base() -> Any:
        built = case.build()
        torch.manual_seed(0)
        built.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), "task")
        return built

    def loras(model: nn.Module) -> list[LoraLayer]:
        return [module for module in model.modules() if isinstance(module, LoraLayer)]

    model, inputs = (
        get_peft_model(base(), VariatorConfig(**FIELDS | fields), adapter_name="plugin").eval(),
        case.inputs(2, 12),
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "variator_" in parameter_name:
                parameter += 0.02 * torch.randn_like(parameter)
    expected = first(model, inputs)
    for module in loras(model):
        module.merge()
    torch.testing.assert_close(first(model, inputs), expected, rtol=0, atol=1e-4)
    if not fields:
        shrink_plugin(model, 8)
    model.save_pretrained(tmp_path)
    for merges in (False, True):
        other = base()
        for module in loras(other) if merges else ():
            module.merge()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*was shrunk beside other weights")
            loaded = PeftModel.from_pretrained(other, str(tmp_path / "plugin"), adapter_name="plugin").eval()
        torch.testing.assert_close(first(loaded, inputs), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("fields", READING, ids=["shrunk", "rank"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_weights_that_are_written_later_are_read_again(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Whichever way they come into the model."""
    case = BY_NAME[name]
    model, inputs = trained(case, **fields), case.inputs(2, 12)
    if not fields:
        shrink_plugin(model, 8)
    expected, state = first(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")

    def other() -> Any:
        """Another base with another plugin."""
        torch.manual_seed(7)
        made = get_peft_model(type(case.build())(case.build().config), VariatorConfig(**FIELDS | fields)).eval()
        if not fields:
            shrink_plugin(made, 8)
        return made

    ways: dict[str, Callable[[Any], object]] = {
        "state": lambda made: made.load_state_dict(state),
        "assigned": lambda made: made.load_state_dict(state, assign=True),
        "accelerate": lambda made: load_checkpoint_in_model(made, str(tmp_path), device_map={"": "cpu"}),
    }
    for way, load in ways.items():
        made = other()
        first(made, inputs)  # read once
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*was shrunk beside other weights")
            load(made)
            assert torch.equal(first(made, inputs), expected), way
        load(made := other())  # and where it was not called before
        assert torch.equal(first(made, inputs), expected), way


def test_another_base_than_its_own_warns(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    model = trained(case)
    shrink_plugin(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    other = type(case.build())(case.build().config)
    with pytest.warns(UserWarning, match="was shrunk beside other weights than this base's"):
        PeftModel.from_pretrained(other, str(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was shrunk beside other weights")
        for dtype in (torch.float32, torch.bfloat16):
            PeftModel.from_pretrained(case.build().to(dtype), str(tmp_path))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_its_own_base_in_int8_does_not_warn_and_another_does(tmp_path: Path) -> None:
    """A large weight makes the steps of `quantize_dynamic` coarse for all others, as in all-mpnet-base-v2."""
    case = BY_NAME["bert"]
    model = trained(case)
    shrink_plugin(model)
    model.save_pretrained(tmp_path)
    others = [int(layer.modules_of("default")["variator_neurons"].rest(48)[0]) for layer in plugin_layers(model)]

    def in_int8(base: Any) -> nn.Module:
        """A base with a large weight in a neuron that is not copied."""
        for block, neuron in zip(base.encoder.layer, others, strict=True):
            into, out = block.intermediate.dense.weight.detach(), block.output.dense.weight.detach()
            into[neuron, 0], out[0, neuron] = 200 * into.std(), 200 * out.std()
        return torch.ao.quantization.quantize_dynamic(base.eval(), {nn.Linear}, dtype=torch.qint8)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was shrunk beside other weights")
        quantize_plugin(PeftModel.from_pretrained(in_int8(case.build()), str(tmp_path)))
    torch.manual_seed(7)
    other = type(case.build())(case.build().config)
    with pytest.warns(UserWarning, match="was shrunk beside other weights than this base's"):
        PeftModel.from_pretrained(in_int8(other), str(tmp_path))


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_are_unrelated_or_in_another_order_do_not_fit(bits: int, scale: float) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(48, 40, generator=generator)
        copies = RoundedRows(40, 48, bits, bias=False)
        copies.set_weight(rows + 0.02, rows)
        assert copies.fits
        copies.set_rows(scale * torch.randn(48, 40, generator=generator))
        assert not copies.fits
        copies.set_rows(scale * rows[torch.randperm(48, generator=generator)])
        assert not copies.fits
        copies.set_rows(rows)
        assert copies.fits


def test_a_call_without_gradients_leaves_it_trainable() -> None:
    case = BY_NAME["bert"]
    model = trained(case)
    shrink_plugin(model)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.mul_(1.0)  # so that it is read again
    with torch.inference_mode():
        model(**case.inputs(2, 12))
    outputs = next(iter(model.train()(**case.inputs(2, 12)).values()))
    outputs.square().mean().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("fields", READING, ids=["shrunk", "rank"])
def test_nothing_is_read_again_while_it_trains(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["bert"]
    model = trained(case, **fields)
    if not fields:
        shrink_plugin(model)
    first(model, case.inputs(2, 12))
    reads: list[Any] = []
    monkeypatch.setattr(base_reading, "read_rows", lambda *arguments: reads.append(arguments))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        next(iter(model.train()(**case.inputs(2, 12)).values())).square().mean().backward()
        optimizer.step()
    assert not reads


@pytest.mark.parametrize("fields", READING, ids=["shrunk", "rank"])
def test_weights_that_are_offloaded_later_are_not_kept(fields: dict[str, Any]) -> None:
    case = BY_NAME["llama"]
    model = trained(case, **fields | {"compensation_rank": None})
    if not fields:
        shrink_plugin(model)
    first(model, case.inputs(2, 12))
    maps = [layer.base_layer.gate_proj for layer in plugin_layers(model)]
    weights = [weakref.ref(module.weight) for module in maps]
    for module in maps:
        cpu_offload(module, torch.device("cpu"))
    gc.collect()
    assert all(is_offloading(module) for module in maps)
    assert all(weight() is None for weight in weights)


def test_an_adapter_that_multiplies_cannot_be_taken_off() -> None:
    case = BY_NAME["llama"]
    base = case.build()
    base.add_adapter(OFTConfig(oft_block_size=4, target_modules=["gate_proj"]), "task")
    for module in base.modules():
        if isinstance(module, OFTLayer):
            module.merge()
    with pytest.raises(ValueError, match="can't tell what it has added. Unmerge it first"):
        get_peft_model(base, VariatorConfig(**FIELDS, correction_rank=2), adapter_name="plugin")
