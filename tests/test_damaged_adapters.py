"""Adapters of both methods, damaged at random: every way to load refuses them by name, and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_variator import SparseLoraConfig, VariatorConfig, load_plugin


FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
IDS = torch.arange(4, 16).reshape(1, 12)
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "neurons": lambda: VariatorConfig(init_weights=False, correction_rank=2, task_type="SEQ_CLS"),
    "bottleneck": lambda: VariatorConfig(init_weights=False, bottleneck_dim=3, compensation_rank=2),
    "sparse": lambda: SparseLoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layer" in name:
                parameter[:, ::2] = 0
    return model


def adapted(method: str) -> PeftModel:
    model = get_peft_model(build(), METHODS[method]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@dataclass
class Damage:
    """What was done to a file, and the names of which the error has to have one."""

    tensors: dict[str, Tensor]
    names: list[str]


def damaged(tensors: dict[str, Tensor], draw: random.Random) -> Damage:
    tensors = dict(tensors)
    key = draw.choice(sorted(tensors))
    value, short = tensors[key], key.removeprefix(PREFIX)
    number = value.is_floating_point()
    base = draw.choice(sorted(name for name, _ in build().named_parameters() if "classifier" not in name))
    renamed = draw.choice([short, f"{key}.default", key.replace(PREFIX, PREFIX * 2), f"base_model.{key}"])
    kinds: list[Callable[[], Any]] = [
        lambda: tensors.pop(key),
        lambda: tensors.update({renamed: tensors.pop(key)}),
        lambda: tensors.update({f"{PREFIX}{base}": torch.zeros(build().get_parameter(base).shape)}),
        lambda: tensors.update({key: torch.cat([value.reshape(1, -1), value.reshape(1, -1)])}),
        lambda: tensors.update({key: torch.zeros(())}),
        lambda: tensors.update({key: value.to(torch.complex64)}),
        lambda: tensors.update({key: value.bool() if number else value.double()}),
        lambda: tensors.update({key: value.to(torch.float8_e4m3fn) if number else value.bool()}),
        lambda: tensors.update({key: torch.full_like(value, torch.nan) if number else value[:0]}),
    ]
    draw.choice(kinds)()
    return Damage(tensors, [short, base, renamed])


WAYS = ["from_pretrained", "load_plugin", "load_adapter", "load_plugin beside", "set_peft_model_state_dict"]


def load(way: str, target: Any, folder: Path) -> PeftModel:
    if way == "from_pretrained":
        return PeftModel.from_pretrained(target, str(folder))
    if way.startswith("load_plugin"):
        return load_plugin(target, folder, "second", is_trainable=False)
    if way == "load_adapter":
        target.load_adapter(str(folder), "second")
        target.set_adapter("second", inference_mode=True)
    else:
        set_peft_model_state_dict(target, load_file(folder / FILE))
    return target


def looks(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("cases", [10, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_damaged_adapter_is_refused_by_the_name_of_the_damage(method: str, cases: int, tmp_path: Path) -> None:
    whole = adapted(method)
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    for case in range(cases):
        draw = random.Random(f"{method} {case}")
        damage, way = damaged(tensors, draw), draw.choice(WAYS)
        save_file({name: value.contiguous() for name, value in damage.tensors.items()}, tmp_path / FILE)
        target = build() if way in ("from_pretrained", "load_plugin") else adapted(method)
        before, modules = {name: value.clone() for name, value in target.state_dict().items()}, looks(target)
        expected = logits(target)
        with pytest.raises(ValueError) as error:  # noqa: PT011 -- of one of several names
            load(way, target, tmp_path)
        # load_plugin looks for the modules first, and names them
        module = damage.names[0].rpartition(".")[0].partition(".base_layer.")[0].partition(".variator_")[0]
        names = damage.names + [module] * way.startswith("load_plugin")
        assert any(name in str(error.value) for name in names), (case, way, names)
        after = target.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert looks(target) == modules
        assert torch.equal(logits(target), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", list(METHODS))
def test_an_adapter_that_is_whole_is_loaded_in_every_way(method: str, way: str, tmp_path: Path) -> None:
    whole = adapted(method)
    whole.save_pretrained(tmp_path)
    target = build() if way in ("from_pretrained", "load_plugin") else adapted(method)
    torch.testing.assert_close(logits(load(way, target, tmp_path).eval()), logits(whole))


@pytest.mark.parametrize("method", list(METHODS))
def test_a_state_dict_of_the_whole_model_is_loaded(method: str) -> None:
    whole = adapted(method)
    other = get_peft_model(build(), METHODS[method]()).eval()
    set_peft_model_state_dict(other, whole.state_dict())
    torch.testing.assert_close(logits(other), logits(whole))


@pytest.mark.parametrize("method", list(METHODS))
def test_an_adapter_that_is_not_there_is_named_beside_those_that_are(method: str) -> None:
    model = adapted(method)
    for use in (set_peft_model_state_dict, get_peft_model_state_dict):
        with pytest.raises(ValueError, match=r"'nobody'.*\['default'\]"):
            use(model, model.state_dict(), adapter_name="nobody")
    if method == "sparse":
        with pytest.raises(ValueError, match=r"'nobody'.*\['default'\]"):
            model.merge_adapter(adapter_names=["nobody"])


@pytest.mark.parametrize("numbers", [[-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 24], [0, 0, 1, 2, 3, 4], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "set_peft_model_state_dict"])
def test_numbers_of_neurons_that_a_network_does_not_have_are_refused(
    numbers: list[int], way: str, tmp_path: Path
) -> None:
    adapted("neurons").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if key.endswith("variator_neurons.index"))
    save_file({**tensors, key: torch.tensor(numbers)}, tmp_path / FILE)
    target = build() if way == "from_pretrained" else adapted("neurons")
    expected = logits(target)
    with pytest.raises(ValueError, match="variator_neurons.index"):
        load(way, target, tmp_path)
    assert torch.equal(logits(target), expected)
