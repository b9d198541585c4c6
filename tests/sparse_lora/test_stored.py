import copy
import json
import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_variator import SparseLoraConfig, SparseLoraModel, attach_masks
from peft_variator.sparsity import PruningConfig, prune
from peft_variator.tuners.sparse_lora import SparseLoraLayer

from .cases import CASES, WEIGHTED, build, outputs, random_masks, randomize_


FILE = "adapter_model.safetensors"


def target_names(name: str) -> list[str]:
    """Every adaptable module of a case, the patch embedding too, but no output embedding."""
    modules = build(name).named_modules()
    return [key for key, module in modules if isinstance(module, WEIGHTED) and key != "lm_head"]


def make(name: str, **fields) -> PeftModel:
    """A dense model with an adapter that stores random masks."""
    names = target_names(name)
    model = get_peft_model(build(name, pruned=False), SparseLoraConfig(mask="stored", target_modules=names, **fields))
    attach_masks(model, random_masks(build(name), names))
    return randomize_(model)


def pruned_twin(name: str, model: PeftModel) -> PeftModel:
    """The same function from a base whose weights are zeroed and an adapter that reads its mask from them."""
    base, names = build(name, pruned=False), target_names(name)
    for key, mask in random_masks(base, names).items():
        module = base.get_submodule(key)
        module.weight.data = torch.where(mask, module.weight.data, 0.0)
    twin = get_peft_model(base, SparseLoraConfig(target_modules=names))
    for key, parameter in twin.named_parameters():
        if "sparse_low_rank_" in key:
            parameter.data = model.get_parameter(key).data.clone()
    return twin


@pytest.mark.parametrize("name", CASES)
def test_the_student_is_that_of_a_pruned_base_and_disabled_is_the_dense_teacher(name: str) -> None:
    model = make(name)
    case = CASES[name]
    expected = outputs(pruned_twin(name, model), case)
    torch.testing.assert_close(outputs(model, case), expected)
    teacher = outputs(build(name, pruned=False), case)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), teacher)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case), expected)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), teacher)
    torch.testing.assert_close(outputs(model, case), expected)


@pytest.mark.parametrize("name", CASES)
def test_merging_prunes_the_base_for_good(name: str) -> None:
    masks = random_masks(build(name), target_names(name))
    merged = make(name).merge_and_unload(safe_merge=True)
    for key, mask in masks.items():
        weight = merged.get_submodule(key).weight
        assert torch.equal(weight != 0, mask)
        assert not weight[~mask].signbit().any()


def test_unloading_leaves_the_dense_base() -> None:
    base = make("bert").unload()
    assert torch.equal(outputs(base, CASES["bert"]), outputs(build("bert", pruned=False), CASES["bert"]))


def test_saved_keys_and_sizes(tmp_path) -> None:
    make("bert").save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    assert saved.keys() == {
        f"base_model.model.{name}.sparse_low_rank_{part}"
        for name in target_names("bert")
        for part in ("A", "B", "mask", "source")
    }
    for key, value in saved.items():
        if key.endswith("mask"):
            module = build("bert").get_submodule(key.split(".", 2)[2].rpartition(".")[0])
            assert value.nbytes == module.weight.numel() // 8
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mask"] == "stored"


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_masks_travel_with_the_adapter(name: str, low_cpu_mem_usage: bool, tmp_path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        build(name, pruned=False), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(outputs(loaded, CASES[name]), outputs(model, CASES[name]))
    loaded = build(name, pruned=False)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(outputs(loaded, CASES[name]), outputs(model, CASES[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_may_be_loaded_in_another_dtype(dtype: torch.dtype, tmp_path) -> None:
    model = make("bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert", pruned=False).to(dtype), tmp_path)
    torch.testing.assert_close(
        outputs(loaded, CASES["bert"]).float(), outputs(model, CASES["bert"]), rtol=0.05, atol=0.05
    )


def other_base() -> nn.Module:
    torch.manual_seed(1)
    return CASES["bert"].build().eval()


def test_another_base_is_refused_when_loading(tmp_path) -> None:
    make("bert").save_pretrained(tmp_path)
    message = (
        "The stored mask of adapter 'default' was made for another base: the weight of "
        "'bert.encoder.layer.0.attention.self.query' is not the one it came from"
    )
    base = other_base()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == names


class Nested(nn.Module):
    """The name of one module is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mlp = nn.Linear(4, 4), nn.ModuleDict({"up": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp["up"](self.up(x))


def test_each_module_gets_the_mask_that_was_made_for_it(tmp_path) -> None:
    model = get_peft_model(Nested(), SparseLoraConfig(mask="stored", target_modules=["up"]))
    attach_masks(model, {name: torch.rand(4, 4) > 0.5 for name in ("up", "mlp.up")})
    x = torch.randn(2, 4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Nested(), tmp_path)(x), model(x))
    tensors = load_file(tmp_path / FILE)
    key = "base_model.model.mlp.up.sparse_low_rank_source"
    save_file(tensors | {key: tensors[key].flip(0)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=re.escape(key)) as raised:
        PeftModel.from_pretrained(Nested(), tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_another_base_is_refused_with_transformers_load_adapter(tmp_path) -> None:
    make("bert").save_pretrained(tmp_path)
    model = other_base()
    model.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="was made for another base"):
        outputs(model, CASES["bert"])


def test_a_mask_of_another_shape_in_a_file_is_refused(tmp_path) -> None:
    make("bert").save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    key = next(key for key in saved if key.endswith("pooler.dense.sparse_low_rank_mask"))
    saved[key] = saved[key][:, :1].contiguous()
    save_file(saved, tmp_path / FILE)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*pooler\.dense\.sparse_low_rank_mask"):
        PeftModel.from_pretrained(build("bert", pruned=False), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        build("bert", pruned=False).load_adapter(str(tmp_path))


def test_a_file_without_a_mask_is_refused(tmp_path) -> None:
    make("bert").save_pretrained(tmp_path)
    saved = load_file(tmp_path / FILE)
    save_file({key: value for key, value in saved.items() if "pooler" not in key or key[-1] in "AB"}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"lacks bert\.pooler\.dense\.sparse_low_rank_mask"):
        PeftModel.from_pretrained(build("bert", pruned=False), tmp_path)


def stored(name: str = "bert", **fields) -> PeftModel:
    return get_peft_model(build(name, pruned=False), SparseLoraConfig(mask="stored", **fields))


@pytest.mark.parametrize("use", ["forward", "merge"])
def test_using_an_adapter_before_it_has_masks_says_what_to_do(use: str) -> None:
    model = stored()
    with pytest.raises(ValueError, match=r"has no mask yet. Call `attach_masks\(model, masks, adapter_name\)`"):
        outputs(model, CASES["bert"]) if use == "forward" else model.merge_adapter()
    with model.disable_adapter():
        outputs(model, CASES["bert"])


def test_masks_for_some_modules_leave_the_others_dense_and_say_so() -> None:
    model = stored()
    masks = random_masks(build("bert"), ["bert.encoder.layer.0.output.dense"])
    with pytest.warns(UserWarning, match="in 13 of the 14 modules of adapter 'default': none of their weights"):
        attach_masks(model, masks)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLoraLayer)}
    for name, layer in layers.items():
        assert bool(layer.get_mask("default").all()) != name.endswith("layer.0.output.dense")


def test_attaching_works_on_every_kind_of_model_that_holds_the_adapter() -> None:
    names = target_names("bert")
    masks = random_masks(build("bert"), names)
    peft_model = stored(target_modules=names)
    peft_model.attach_masks(masks)
    assert isinstance(peft_model.base_model, SparseLoraModel)
    transformers_model = build("bert", pruned=False)
    transformers_model.add_adapter(SparseLoraConfig(mask="stored", target_modules=names), adapter_name="mine")
    attach_masks(transformers_model, masks, "mine")
    mask = transformers_model.get_submodule(names[0]).get_mask("mine")
    assert torch.equal(mask, peft_model.get_base_model().get_submodule(names[0]).get_mask("default"))
    assert torch.equal(mask, masks[names[0]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m | {"bert.nothing": m["classifier"]}, ValueError, "does not adapt 1 of the 15 masked modules"),
        (lambda m: m | {"classifier": m["classifier"].float()}, TypeError, "'classifier' must be bool (True = kept)"),
        (lambda m: m | {"classifier": m["classifier"].t()}, ValueError, "'classifier' is (16, 2) as (out_features, "),
    ],
    ids=["unknown module", "dtype", "shape"],
)
def test_masks_that_do_not_fit_are_named(change, error, message) -> None:
    names = target_names("bert")
    with pytest.raises(error, match=re.escape(message)):
        attach_masks(stored(target_modules=names), change(random_masks(build("bert"), names)))


def test_errors_of_attaching() -> None:
    masks = random_masks(build("bert"), ["classifier"])
    with pytest.raises(ValueError, match="no SparseLoRA adapter named 'other'"):
        attach_masks(stored(), masks, "other")
    with pytest.raises(ValueError, match="stores no mask: it was made with mask='weight'"):
        attach_masks(get_peft_model(build("bert"), SparseLoraConfig()), masks)
    model = make("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Unmerge \['default'\]"):
        attach_masks(model, masks)


def test_adapters_of_different_masks_are_not_mixed() -> None:
    model = make("bert")
    names = target_names("bert")
    model.add_adapter("inverse", SparseLoraConfig(mask="stored", target_modules=names))
    attach_masks(model, {key: ~mask for key, mask in random_masks(build("bert"), names).items()}, "inverse")
    model.base_model.set_adapter(["default", "inverse"])
    with pytest.raises(ValueError, match=r"The adapters \['default', 'inverse'\] have different masks in"):
        outputs(model, CASES["bert"])
    with pytest.raises(ValueError, match="cannot be active or merged together"):
        model.merge_adapter()


def test_adapters_of_one_mask_are_mixed_and_merged() -> None:
    model = make("bert")
    names = target_names("bert")
    model.add_adapter("second", SparseLoraConfig(mask="stored", target_modules=names, init_lora_weights=False, r=2))
    attach_masks(model, random_masks(build("bert"), names), "second")
    model.base_model.set_adapter(["default", "second"])
    expected = outputs(model, CASES["bert"])
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    torch.testing.assert_close(outputs(model, CASES["bert"]), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, CASES["bert"]), outputs(build("bert", pruned=False), CASES["bert"]))


def test_a_stored_mask_equal_to_the_zeros_of_the_base_goes_with_an_adapter_that_reads_them() -> None:
    base = build("bert")
    names = target_names("bert")
    model = get_peft_model(copy.deepcopy(base), SparseLoraConfig(target_modules=names))
    model.add_adapter("stored", SparseLoraConfig(mask="stored", target_modules=names))
    attach_masks(model, {name: base.get_submodule(name).weight != 0 for name in names}, "stored")
    model.base_model.set_adapter(["default", "stored"])
    assert torch.equal(outputs(model, CASES["bert"]), outputs(base, CASES["bert"]))


def test_loading_again_after_merging_and_unmerging(tmp_path) -> None:
    model = make("bert")
    model.save_pretrained(tmp_path)
    expected = outputs(model, CASES["bert"])
    model.merge_adapter()
    model.unmerge_adapter()
    model.load_adapter(tmp_path, adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(outputs(model, CASES["bert"]), expected)


def test_gradients_stay_under_the_mask() -> None:
    model = make("bert")
    outputs(model, CASES["bert"]).square().sum().backward()
    twin = pruned_twin("bert", model)
    outputs(twin, CASES["bert"]).square().sum().backward()
    for key, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_halving_a_model_leaves_masks_and_fingerprints_alone() -> None:
    model = make("bert")
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(("mask.default",))}
    model = model.half()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    outputs(model, CASES["bert"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masks_of_a_pruning_report_go_in_as_they_are(name: str) -> None:
    base = build(name, pruned=False)
    report = prune(base, PruningConfig(method="magnitude", pattern="2:4", keep_dense=True))
    model = get_peft_model(base, SparseLoraConfig(mask="stored", target_modules=list(report.masks)))
    attach_masks(model, report.masks)
    merged = randomize_(model).merge_and_unload()
    for key, mask in report.masks.items():
        assert torch.equal(merged.get_submodule(key).weight != 0, mask)


def test_base_weights_that_are_loaded_later_are_checked_too() -> None:
    model = make("bert")
    outputs(model, CASES["bert"])
    state = model.state_dict()
    key = next(key for key in state if key.endswith("pooler.dense.base_layer.weight"))
    with pytest.raises(ValueError, match=r"was made for another base: the weight of 'bert\.pooler\.dense'"):
        model.load_state_dict({**state, key: state[key] + 1})
