import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import SparseLoraLinear
from peft_variator.tuners.sparse_lora.functional import merge_update

from ..bases.reference import prune_two_four
from .cases import CASES, build, outputs, randomize_


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=60)
@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10_000), size=st.sampled_from([1e-8, 1e-3, 1.0, 1e3]))
def test_merge_and_unmerge_against_a_loop(dtype: torch.dtype, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(5, 7, generator=generator) < 0.6
    weight = (torch.randn(5, 7, generator=generator) * kept).to(dtype)
    kept = weight != 0
    exact = torch.promote_types(dtype, torch.float32)
    update = (torch.randn(5, 7, generator=generator) * size).to(exact)
    update[0, 0] = -weight[0, 0].to(exact)  # cancels exactly
    merged = merge_update(weight, update, kept)
    restored = merge_update(merged, -update, kept)
    assert merged.dtype == restored.dtype == dtype
    for row in range(5):
        for column in range(7):
            value, change = weight[row, column].item(), update[row, column].item()
            found, back = merged[row, column], restored[row, column]
            if not kept[row, column]:
                assert found.item() == back.item() == 0
                assert not found.signbit()
                assert not back.signbit()
                continue
            assert found.item() != 0
            assert back.item() != 0
            resolution = torch.finfo(dtype).eps
            smallest = 2**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
            assert abs(found.item() - (value + change)) <= resolution * abs(value + change) + 2 * smallest
            assert abs(back.item() - value) <= 2 * resolution * max(abs(value), abs(value + change)) + 2 * smallest


def test_a_kept_weight_that_is_zero_and_gets_no_update_stays_positive_zero() -> None:
    kept = torch.ones(1, 2, dtype=torch.bool)
    merged = merge_update(torch.tensor([[-0.0, 0.0]]), torch.zeros(1, 2), kept)
    assert merged.tolist() == [[0.0, 0.0]]
    assert not merged.signbit().any()


def make_layer(dtype: torch.dtype, mask: str = "weight", names: tuple[str, ...] = ("one", "two")) -> SparseLoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(16, 8)
    kept = prune_two_four(base.weight.detach()) != 0
    if mask == "weight":
        base.weight.data.mul_(kept)  # leaves -0.0 behind, as many pruners do
    layer = SparseLoraLinear(base.to(dtype).requires_grad_(False), "module")
    for name in names:
        layer.update_layer(name, SparseLoraConfig(init_lora_weights=False, mask=mask), rank=3, alpha=2)
        if mask == "stored":
            layer.attach_mask(name, kept)
    layer.set_adapter(list(names))
    return layer


def is_two_four(weight: torch.Tensor) -> bool:
    return bool(((weight.reshape(-1, 4) != 0).sum(dim=1) == 2).all())


@pytest.mark.parametrize("mask", ["weight", "stored"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_layers_compute_the_same_and_stay_two_four(dtype: torch.dtype, mask: str) -> None:
    layer = make_layer(dtype, mask)
    x = torch.randn(5, 16).to(dtype)
    before, weight = layer(x), layer.weight.clone()
    layer.merge()
    assert is_two_four(layer.weight)
    assert not layer.weight[layer.weight == 0].signbit().any()
    assert (layer(x) - before).double().norm() <= 4 * torch.finfo(dtype).eps * before.double().norm()
    layer.unmerge()
    assert (layer.weight - weight).double().norm() <= 2 * torch.finfo(dtype).eps * weight.double().norm()
    kept = layer.get_mask("one")
    assert torch.equal(layer.weight[~kept], weight[~kept])
    if mask == "stored":
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("mask", ["weight", "stored"])
def test_adapters_merged_one_after_the_other_or_together(mask: str) -> None:
    layer, other = make_layer(torch.float32, mask), make_layer(torch.float32, mask)
    other.load_state_dict(layer.state_dict())
    layer.merge(adapter_names=["one", "two"])
    other.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="You are now additionally merging two"):
        other.merge(adapter_names=["two"])
    assert layer.merged_adapters == other.merged_adapters == ["one", "two"]
    torch.testing.assert_close(layer.weight, other.weight, rtol=1e-6, atol=1e-7)
    weight = make_layer(torch.float32, mask).weight
    other.unmerge()
    torch.testing.assert_close(other.weight, weight, rtol=1e-6, atol=1e-6)


def test_merging_again_does_nothing() -> None:
    layer = make_layer(torch.float32)
    layer.merge()
    weight = layer.weight.clone()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge()
    assert torch.equal(layer.weight, weight)


def test_unmerging_what_is_not_merged_warns() -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        make_layer(torch.float32).unmerge()


def test_the_mask_is_not_read_from_the_merged_weight() -> None:
    layer = make_layer(torch.float32)
    mask = layer.get_mask("one")
    layer.sparse_low_rank_A["one"].data.zero_()
    layer.sparse_low_rank_A["two"].data.zero_()
    layer.merge()
    layer.get_base_layer().weight.data.mul_(0)
    assert torch.equal(layer.get_mask("one"), mask)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("masked", [True, False])
def test_safe_merge_catches_what_is_not_finite(value: float, masked: bool) -> None:
    layer = make_layer(torch.float32)
    weight = layer.weight.clone()
    column = int((weight[0] == 0).nonzero()[0]) if masked else int(weight[0].nonzero()[0])
    layer.sparse_low_rank_A["two"].data[:, column] = value
    with pytest.raises(ValueError, match=r"NaNs detected.* adapter one, two seems.*'module' is not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def test_safe_merge_catches_an_overflow_of_the_dtype() -> None:
    layer = make_layer(torch.float16)
    layer.sparse_low_rank_A["one"].data.fill_(300)
    layer.sparse_low_rank_B["one"].data.fill_(300)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_merge_and_unload_gives_the_base_architecture_with_its_zeros(name: str, dtype: torch.dtype) -> None:
    base = build(name).to(dtype)
    case = CASES[name]
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in case.inputs.items()}
    zeros = {key: value == 0 for key, value in base.state_dict().items() if key.endswith("weight")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = randomize_(get_peft_model(base, SparseLoraConfig(**case.targets)))
    expected = model(**inputs).logits
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(build(name))
    assert merged.state_dict().keys() == build(name).state_dict().keys()
    assert (merged(**inputs).logits - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
    for key, weight in merged.state_dict().items():
        if key in zeros:
            assert torch.equal(weight == 0, zeros[key]), key


def test_merge_and_unmerge_a_model() -> None:
    case = CASES["bert"]
    base = build("bert")
    expected_base = outputs(base, case)
    model = randomize_(get_peft_model(base, SparseLoraConfig()))
    expected = outputs(model, case)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case), expected)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, case), expected_base)
    torch.testing.assert_close(outputs(model, case), expected)
    assert not any(module.merged for module in model.modules() if isinstance(module, SparseLoraLinear))


def test_a_scale_that_is_set_while_merged_waits_for_the_next_merge() -> None:
    layer = make_layer(torch.float32)
    base = layer.base_layer.weight.detach().clone()
    layer.sparse_low_rank_B["two"].data.zero_()
    layer.merge(adapter_names=["one"])
    merged = layer.base_layer.weight.detach().clone()
    layer.set_scale("one", 5.0)
    layer.merge(adapter_names=["two"])  # adds nothing
    torch.testing.assert_close(layer.base_layer.weight, merged, rtol=0, atol=1e-6)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, base, rtol=0, atol=1e-6)
    layer.merge(adapter_names=["one"])
    torch.testing.assert_close(layer.base_layer.weight - base, 5 * (merged - base), rtol=0, atol=1e-5)


def test_nothing_is_loaded_into_an_adapter_that_is_merged() -> None:
    model = get_peft_model(build("llama"), SparseLoraConfig(init_lora_weights=False))
    state = {name: 3 * value for name, value in get_peft_model_state_dict(model).items()}
    layer = next(module for module in model.modules() if isinstance(module, SparseLoraLinear))
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        set_peft_model_state_dict(model, state)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=0, atol=1e-6)
    set_peft_model_state_dict(model, state)
