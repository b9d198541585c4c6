"""`compensation_rank`: a low-rank update of the block's maps, while the plugin merges and at no other time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_variator import VariatorConfig
from tests.tiny_models import ALL, BERT, BY_NAME, LLAMA, Case, by_name

from .reference import assert_the_plugin_alone_learns, first


T5 = next(case for case in ALL if case.name == "t5")
OPT = next(case for case in ALL if case.name == "opt")
GPT2 = next(case for case in ALL if case.name == "gpt2")
VIT = next(case for case in ALL if case.name == "vit")
MIXTRAL = next(case for case in ALL if case.name == "mixtral")
FORMS = [BERT, LLAMA, T5, OPT, GPT2, VIT, MIXTRAL]


def compensated(case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    fields = {"compensation_rank": 3} | fields
    return get_peft_model(case.build(), VariatorConfig(**fields)).eval()


def updates_of(model: nn.Module) -> set[str]:
    """Names of the maps that have an update, in the base model."""
    key = "variator_compensation_A.default.weight"
    names = {name for name, _ in model.named_parameters() if name.endswith(key)}
    return {
        name.removeprefix("base_model.model.").removesuffix(f".{key}").replace(".base_layer", "") for name in names
    }


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_the_untrained_update_changes_nothing(case: Case) -> None:
    inputs = case.inputs(2, 12)
    model, without = compensated(case), compensated(case, compensation_rank=None)
    assert torch.equal(first(model, inputs), first(without, inputs))


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_at_one_the_base_bit_for_bit(case: Case) -> None:
    model, inputs = compensated(case, init_weights=False), case.inputs(2, 12)
    merged = first(model, inputs)
    model.set_compression_ratio(1)
    assert not torch.equal(merged, first(model, inputs))
    assert torch.equal(first(model, inputs), first(case.build(), inputs))
    model.set_compression_ratio(4)
    with model.disable_adapter():
        assert torch.equal(first(model, inputs), first(case.build(), inputs))


def test_attention_and_network_have_updates() -> None:
    layer = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
    layer |= {"intermediate.dense", "output.dense"}
    assert {name.partition(".layer.0.")[2] for name in updates_of(compensated(BERT)) if ".0." in name} == layer
    layer = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {name.partition(".layers.0.")[2] for name in updates_of(compensated(LLAMA)) if ".0." in name} == layer


def test_experts_have_none() -> None:
    names = updates_of(compensated(MIXTRAL))
    assert names
    assert not any("mlp" in name or "experts" in name for name in names)


def test_layers_without_a_plugin_have_none() -> None:
    assert {name.split(".layer.")[1][0] for name in updates_of(compensated(BERT, layers_to_transform=[1]))} == {"1"}


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=by_name)
def test_against_the_sum_of_weights(case: Case) -> None:
    """What the plugin gives is what it gives around a base whose weights have B·A added."""
    model, inputs = compensated(case, init_weights=False), case.inputs(2, 13)
    expected = compensated(case, compensation_rank=None, init_weights=False)
    expected.load_state_dict(
        {name: v for name, v in model.state_dict().items() if "_compensation_" not in name}, strict=False
    )
    plain = case.build()
    for name, module in expected.named_modules():
        mine = model.get_submodule(name) if name in dict(model.named_modules()) else None
        if hasattr(mine, "variator_compensation_A") and mine.variator_compensation_A:
            down, up = mine.variator_compensation_A["default"].weight, mine.variator_compensation_B["default"].weight
            weight = (module.base_layer if hasattr(module, "base_layer") else module).weight
            weight.data = (
                plain.get_submodule(name.removeprefix("base_model.model.").replace(".base_layer", "")).weight.data
                + (up @ down).detach()
            )
    for name, parameter in model.named_parameters():
        if "variator_" in name and "_compensation_" not in name:
            expected.get_parameter(name).data = parameter.data
    torch.testing.assert_close(first(model, inputs), first(expected, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FORMS, ids=by_name)
def test_saved_and_loaded_and_unloaded(case: Case, tmp_path: Path) -> None:
    model, inputs = compensated(case, init_weights=False), case.inputs(2, 12)
    model.save_pretrained(tmp_path)
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(case.build(), str(tmp_path), adapter_name=name).eval()
        assert torch.equal(first(loaded, inputs), first(model, inputs))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    base = loaded.unload()
    assert set(base.state_dict()) == set(case.build().state_dict())
    assert torch.equal(first(base, inputs), first(case.build(), inputs))


def test_each_plugin_has_its_own() -> None:
    model, inputs = compensated(BERT, init_weights=False), BERT.inputs(2, 12)
    alone = first(model, inputs)
    model.add_adapter("without", VariatorConfig(init_weights=False))
    model.add_adapter("wide", VariatorConfig(compensation_rank=5, init_weights=False))
    assert torch.equal(first(model, inputs), alone)
    model.set_adapter("without")
    assert not torch.equal(first(model, inputs), alone)
    with model.base_model.using_ratio(4, "default"):
        assert torch.equal(first(model, inputs), alone)
    model.delete_adapter("wide")
    model.set_adapter("default")
    assert torch.equal(first(model, inputs), alone)


def test_every_update_learns_and_no_base_weight() -> None:
    for case in (BERT, LLAMA):
        model = compensated(case, decompression="neurons").train()
        assert_the_plugin_alone_learns(model, case)


def test_a_task_lora_stays_what_it_is() -> None:
    inputs = BERT.inputs(2, 12)
    torch.manual_seed(0)
    base = get_peft_model(BERT.build(), LoraConfig(target_modules=["query"], init_lora_weights=False)).base_model.model
    expected = first(base.eval(), inputs)
    model = get_peft_model(base, VariatorConfig(compensation_rank=2)).eval()
    assert "bert.encoder.layer.0.attention.self.query" in updates_of(model) or any(
        "query" in n for n in updates_of(model)
    )
    model.set_compression_ratio(1)
    assert torch.equal(first(model, inputs), expected)
    assert torch.equal(first(model.unload(), inputs), expected)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "4"])
def test_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises(ValueError, match="compensation_rank"):
        VariatorConfig(compensation_rank=rank)


def test_many_tokens_and_few_give_the_same() -> None:
    """Where there are many, W + B·A is made once; what trains, and what hooks see, goes the other way."""
    model, inputs = compensated(BERT, init_weights=False), BERT.inputs(4, 64)
    summed = first(model, inputs)
    seen: list[int] = []
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda module, args, output: seen.append(1))
    torch.testing.assert_close(first(model, inputs), summed, rtol=1e-4, atol=1e-5)
    assert seen


def test_maps_whose_weights_alone_are_read_get_no_update() -> None:
    """WavLM's attention hands the weights of its maps to torch, so an update around one would do nothing."""
    case = BY_NAME["wavlm"]
    model = compensated(case)
    assert updates_of(model)
    assert not any("attention" in name for name in updates_of(model))
    assert_the_plugin_alone_learns(model.train(), case)
