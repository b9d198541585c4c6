"""SparseLoRA and PEFT's LoRA on one model: neither may touch the other's parameters."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_variator import SparseLoraConfig

from .cases import CASES, build, outputs, randomize_


TARGETS = {
    "beside each other": (["query", "value"], ["intermediate.dense", "output.dense"]),
    "on the same modules": (["query", "output.dense"], ["query", "output.dense"]),
}
BERT = CASES["bert"]


def configs(where: str) -> dict[str, LoraConfig | SparseLoraConfig]:
    lora_targets, sparse_targets = TARGETS[where]
    return {
        "plain": LoraConfig(target_modules=lora_targets, r=2),
        "sparse": SparseLoraConfig(target_modules=sparse_targets, r=2),
    }


def both(where: str, order: tuple[str, str]) -> nn.Module:
    """A transformers model with both adapters, added in this order, both active."""
    model = build("bert")
    for name in order:
        model.add_adapter(configs(where)[name], adapter_name=name)
    model.set_adapter(["plain", "sparse"])
    return randomize_(model)


def adapter_parameters(model: nn.Module, marker: str) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if marker in name}


orders = pytest.mark.parametrize("order", [("plain", "sparse"), ("sparse", "plain")], ids=" ".join)
places = pytest.mark.parametrize("where", TARGETS)


@places
@orders
def test_both_train_and_only_the_active_one_is_trainable(where: str, order: tuple[str, str]) -> None:
    model = both(where, order).train()
    outputs(model, BERT).square().sum().backward()
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    lora, sparse = adapter_parameters(model, ".lora_"), adapter_parameters(model, ".sparse_low_rank_")
    assert trainable == lora.keys() | sparse.keys()
    assert all(value.grad.abs().sum() > 0 for value in (lora | sparse).values())
    model.set_adapter("sparse")
    assert {name for name, value in model.named_parameters() if value.requires_grad} == sparse.keys()
    model.set_adapter("plain")
    assert {name for name, value in model.named_parameters() if value.requires_grad} == lora.keys()


@orders
def test_states_are_kept_apart_and_load_in_any_order(order: tuple[str, str]) -> None:
    where = "beside each other"
    model = both(where, order)
    states = {name: model.get_adapter_state_dict(name) for name in ("plain", "sparse")}
    assert all(".lora_" in key for key in states["plain"])
    assert all(".sparse_low_rank_" in key for key in states["sparse"])
    fresh = build("bert")
    for name in order:
        config = configs(where)[name]
        fresh.load_adapter(adapter_state_dict=states[name], peft_config=config, adapter_name=name)
    fresh.set_adapter(["plain", "sparse"])
    for name, expected in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], expected), name
    assert torch.equal(outputs(fresh, BERT), outputs(model, BERT))


@places
@orders
@pytest.mark.parametrize("deleted", ["plain", "sparse"])
def test_deleting_one_leaves_the_other(where: str, order: tuple[str, str], deleted: str) -> None:
    model = both(where, order)
    kept = "sparse" if deleted == "plain" else "plain"
    model.set_adapter(kept)
    expected = outputs(model, BERT)
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept]
    assert not any(name.endswith(f".{deleted}") or f".{deleted}." in name for name in model.state_dict())
    assert torch.equal(outputs(model, BERT), expected)


@places
@orders
def test_states_are_kept_apart_wherever_they_are(where: str, order: tuple[str, str]) -> None:
    model = both(where, order)
    for name, marker in (("plain", ".lora_"), ("sparse", ".sparse_low_rank_")):
        state = model.get_adapter_state_dict(name)
        assert len(state) == len(adapter_parameters(model, marker))
        assert all(marker in key for key in state)


def test_each_alone_is_what_it_is_without_the_other() -> None:
    where = "beside each other"
    model = both(where, ("plain", "sparse"))
    states = {name: model.get_adapter_state_dict(name) for name in ("plain", "sparse")}
    for name, state in states.items():
        model.set_adapter(name)
        single = build("bert")
        single.load_adapter(adapter_state_dict=state, peft_config=configs(where)[name], adapter_name=name)
        torch.testing.assert_close(outputs(model, BERT), outputs(single, BERT))


def test_a_lora_peft_model_around_a_sparse_adapter_saves_only_its_own(tmp_path) -> None:
    base = build("bert")
    base.add_adapter(SparseLoraConfig(target_modules=["query"]), adapter_name="sparse")
    randomize_(base)
    expected = outputs(base, BERT)
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):
        model = get_peft_model(base, LoraConfig(target_modules=["output.dense"]), adapter_name="plain")
    model.save_pretrained(tmp_path, selected_adapters=["plain"])
    saved = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert saved
    assert all(".lora_" in key for key in saved)
    assert not any(value.requires_grad for value in adapter_parameters(model, "query.base_layer").values())
    model.base_model.set_adapter(["plain", "sparse"])
    torch.testing.assert_close(outputs(model, BERT), expected)  # LoRA's B is still zero


def test_a_merged_task_lora_is_the_base_of_a_sparse_adapter(tmp_path) -> None:
    """Merging LoRA first fills the zeros, which the warning of a dense target shows."""
    lora = randomize_(get_peft_model(build("bert"), LoraConfig(target_modules=["query"])))
    merged = lora.merge_and_unload()
    with pytest.warns(UserWarning, match="Nothing is masked in 2 of the 2 modules"):
        model = get_peft_model(merged, SparseLoraConfig(target_modules=["query"]))
    assert isinstance(model, PeftModel)
