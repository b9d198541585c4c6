"""Adapter files that are not what they should be: refused with the key, and nothing has changed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_variator import SparseLoraConfig
from peft_variator.training import load_plugin
from peft_variator.tuners.sparse_lora import SparseLoraLayer

from .cases import CASES, build, outputs, prune_, randomize_


BERT = CASES["bert"]
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
QUERY = "bert.encoder.layer.0.attention.self.query"
A = f"{PREFIX}{QUERY}.sparse_low_rank_A"

DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a weight of the base": (lambda t: t | {f"{PREFIX}{QUERY}.weight": torch.ones(16, 16)}, f"{QUERY}.weight"),
    "an adapted weight of the base": (
        lambda t: t | {f"{PREFIX}{QUERY}.base_layer.weight": torch.ones(16, 16)},
        f"{QUERY}.base_layer.weight",
    ),
    "the base's embeddings": (
        lambda t: t | {f"{PREFIX}bert.embeddings.word_embeddings.weight": torch.ones(40, 16)},
        "word_embeddings.weight",
    ),
    "a bias that is not trained": (lambda t: t | {f"{PREFIX}{QUERY}.base_layer.bias": torch.ones(16)}, "query.base"),
    "NaN": (lambda t: t | {A: torch.full_like(t[A], torch.nan)}, f"{QUERY}.sparse_low_rank_A"),
    "infinity": (lambda t: t | {A: t[A].index_fill(0, torch.tensor([1]), -torch.inf)}, f"{QUERY}.sparse_low_rank_A"),
    "integers": (lambda t: t | {A: t[A].int()}, f"{QUERY}.sparse_low_rank_A"),
    "a missing tensor": (lambda t: {key: value for key, value in t.items() if key != A}, f"{QUERY}.sparse_low_rank_A"),
    "a surplus tensor": (lambda t: t | {f"{PREFIX}bert.nothing.sparse_low_rank_A": t[A].clone()}, "bert.nothing"),
    "a renamed key": (lambda t: {key.replace("_rank_A", "_rank_C"): value for key, value in t.items()}, "_rank_C"),
    "another rank": (lambda t: t | {A: t[A][:1].contiguous()}, f"{QUERY}.sparse_low_rank_A"),
    "no tensor": (lambda t: {}, "sparse_low_rank_A"),
}
damages = pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)


def saved_adapter(folder: Path, **fields) -> Path:
    config = SparseLoraConfig(target_modules=["query", "output.dense"], r=2, **fields)
    randomize_(get_peft_model(build("bert"), config)).save_pretrained(folder)
    return folder


def damaged_adapter(folder: Path, damage, **fields) -> Path:
    saved_adapter(folder, **fields)
    tensors = {key: value.contiguous() for key, value in damage(load_file(folder / FILE)).items()}
    save_file(tensors, folder / FILE)
    return folder


def state(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {name: (value.clone(), trains.get(name, False)) for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[Tensor, bool]]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name][0], before[name][0]) and after[name][1] == before[name][1] for name in before)


@damages
@pytest.mark.parametrize("load", [PeftModel.from_pretrained, load_plugin], ids=["PEFT", "load_plugin"])
def test_a_damaged_file_is_refused_with_its_key_and_the_base_is_as_before(load, damage, named, tmp_path) -> None:
    folder = damaged_adapter(tmp_path / "adapter", damage)
    base = build("bert")
    before, modules = state(base), [type(module) for module in base.modules()]
    if load is load_plugin and not load_file(folder / FILE):
        named = "fit this model"  # it looks for modules first, and there are none
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        load(base, folder)
    assert load is load_plugin or str(folder) in str(error.value)
    assert_unchanged(base, before)
    assert [type(module) for module in base.modules()] == modules
    assert not hasattr(base, "peft_config")


@damages
def test_a_damaged_file_does_not_become_one_more_adapter(damage, named, tmp_path) -> None:
    model = PeftModel.from_pretrained(build("bert"), saved_adapter(tmp_path / "whole"), is_trainable=True)
    folder = damaged_adapter(tmp_path / "damaged", damage)
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(named)):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert_unchanged(model, before)
    model.load_adapter(tmp_path / "whole", "second")
    assert list(model.peft_config) == ["default", "second"]


@damages
def test_a_damaged_state_dict_leaves_the_adapter_that_was_there(damage, named) -> None:
    model = randomize_(get_peft_model(build("bert"), SparseLoraConfig(target_modules=["query", "output.dense"], r=2)))
    tensors = damage(get_peft_model_state_dict(model))
    before = state(model)
    with pytest.raises(ValueError, match=re.escape(named)):
        set_peft_model_state_dict(model, tensors)
    assert list(model.peft_config) == ["default"]
    assert_unchanged(model, before)


def test_the_state_of_the_whole_model_is_loaded() -> None:
    config = SparseLoraConfig(target_modules=["query"], r=2)
    model, other = (get_peft_model(build("bert"), config) for _ in range(2))
    randomize_(model)
    set_peft_model_state_dict(other, model.state_dict())
    assert torch.equal(outputs(other, BERT), outputs(model, BERT))
    with pytest.raises(ValueError, match="nobody.weight"):
        set_peft_model_state_dict(other, {**model.state_dict(), "nobody.weight": torch.ones(1)})


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["classifier"]}], ids=str
)
def test_what_is_trained_beside_the_adapter_is_loaded_with_it(fields, tmp_path) -> None:
    folder = saved_adapter(tmp_path, **fields)
    tensors = load_file(folder / FILE)
    save_file({key: value + 1 if ".bias" in key else value for key, value in tensors.items()}, folder / FILE)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(build("bert"), folder))
    key = next(key for key in tensors if key.endswith((".base_layer.bias", "classifier.bias")))
    assert torch.equal(loaded[key], tensors[key] + 1)


def test_adapters_on_another_architecture_are_refused_by_name(tmp_path) -> None:
    saved_adapter(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({key.replace("layer.1", "layer.7"): value for key, value in tensors.items()}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"layer\.7.* lacks .*layer\.1"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


@pytest.mark.parametrize("name", ["", "a.b"])
def test_a_name_that_cannot_be_one_leaves_nothing_behind(name) -> None:
    base = build("bert")
    before = state(base)
    with pytest.raises(ValueError, match="adapter_name="):
        get_peft_model(base, SparseLoraConfig(), adapter_name=name)
    assert_unchanged(base, before)
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("adds", ["get_peft_model", "add_adapter of PEFT", "add_adapter of transformers"])
def test_a_target_that_cannot_be_adapted_leaves_nothing_behind(adds: str) -> None:
    base = build("bert")
    if adds == "add_adapter of PEFT":
        model = get_peft_model(base, SparseLoraConfig(target_modules=["query"]))
        add = lambda: model.add_adapter("second", SparseLoraConfig(target_modules=["query", "LayerNorm"]))  # noqa: E731
    elif adds == "add_adapter of transformers":
        add = lambda: base.add_adapter(SparseLoraConfig(target_modules=["query", "LayerNorm"]))  # noqa: E731
    else:
        add = lambda: get_peft_model(base, SparseLoraConfig(target_modules=["query", "LayerNorm"]))  # noqa: E731
    before, modules = state(base), [type(module) for module in base.modules()]
    with pytest.raises(TypeError, match="LayerNorm"):
        add()
    assert_unchanged(base, before)
    assert [type(module) for module in base.modules()] == modules
    if adds == "add_adapter of transformers":
        base.add_adapter(SparseLoraConfig(target_modules=["query"]))
        assert list(base.peft_config) == ["default"]
    if adds == "add_adapter of PEFT":
        assert list(model.peft_config) == ["default"]
        layers = [module for module in base.modules() if isinstance(module, SparseLoraLayer)]
        assert all(list(layer.rank) == ["default"] for layer in layers)


def rounded_to_int8(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = (module.weight.data / scale).round() * scale
    return model


def test_an_adapter_knows_the_zeros_that_it_was_trained_on(tmp_path) -> None:
    model = get_peft_model(build("bert"), SparseLoraConfig())
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].base_fingerprint
    PeftModel.from_pretrained(build("bert"), tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        PeftModel.from_pretrained(build("bert").to(dtype), tmp_path)
    PeftModel.from_pretrained(rounded_to_int8(build("bert")), tmp_path)
    base = prune_(build("bert", pruned=False), sparsity=0.6)
    names = list(base.state_dict())
    for load in (PeftModel.from_pretrained, load_plugin, lambda model, path: model.load_adapter(str(path))):
        with pytest.raises(ValueError, match="'default' was trained on another base.*base_fingerprint"):
            load(base, tmp_path)
        assert list(base.state_dict()) == names


def test_files_without_a_fingerprint_still_load(tmp_path) -> None:
    saved_adapter(tmp_path)
    config = SparseLoraConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    config.save_pretrained(tmp_path)
    base = build("bert")
    prune_(base, sparsity=0.9)
    PeftModel.from_pretrained(base, tmp_path)


def test_one_config_for_two_bases_tells_of_each_its_own(tmp_path) -> None:
    config = SparseLoraConfig()
    first = get_peft_model(build("bert"), config)
    other = build("bert")
    prune_(other, sparsity=0.9)
    second = get_peft_model(other, config)
    assert first.peft_config["default"].base_fingerprint != second.peft_config["default"].base_fingerprint
    first.save_pretrained(tmp_path)
    PeftModel.from_pretrained(build("bert"), tmp_path)


def test_a_mask_that_is_stored_needs_no_fingerprint_of_zeros() -> None:
    assert (
        get_peft_model(build("bert"), SparseLoraConfig(mask="stored")).peft_config["default"].base_fingerprint is None
    )
