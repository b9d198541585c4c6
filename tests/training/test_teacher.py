"""The teacher is the model without what is trained, and with everything else; the base runs without dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from training_cases import TEXT
from transformers import PreTrainedModel

from peft_variator import VariatorConfig
from peft_variator.training.teacher import InPlaceTeacher, SeparateTeacher, TrainedAdapters
from tests.tiny_models import tiny_model


LORA = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}


@pytest.fixture
def batch(examples: Callable[..., Any], collate: Callable[..., Any]) -> dict[str, Tensor]:
    return collate(examples("bert-classifier", count=3, labels=False))


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def teacher_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the teacher, having checked that asking it changes nothing."""
    adapters, student = TrainedAdapters(model), logits(model, batch)
    before = flags(model)
    teacher = InPlaceTeacher(model, adapters).outputs(model, batch)["logits"]
    assert not teacher.requires_grad
    assert flags(model) == before
    assert logits(model, batch).equal(student)
    return teacher


def test_the_teacher_of_a_plugin_is_the_base(base_model, plugin_model, batch) -> None:
    model = plugin_model("bert-classifier", init_weights=False)
    teacher = teacher_logits(model, batch)
    assert teacher.equal(logits(base_model("bert-classifier"), batch))
    assert not teacher.equal(logits(model, batch))


def test_a_frozen_adapter_stays_frozen(plugin_model, batch) -> None:
    model = plugin_model("bert-classifier", init_weights=False)
    model.add_adapter("frozen", VariatorConfig(init_weights=False))
    teacher_logits(model, batch)
    own = {name: flag for name, flag in flags(model).items() if ".frozen." in name}
    assert own
    assert not any(own.values())


def test_a_task_lora_of_the_same_name_stays_on(base_model, batch) -> None:
    base = base_model("bert-classifier")
    base.add_adapter(LoraConfig(**LORA))
    with_lora = logits(base, batch)
    model = get_peft_model(base, VariatorConfig(init_weights=False))
    assert teacher_logits(model, batch).equal(with_lora)
    assert not with_lora.equal(logits(base_model("bert-classifier"), batch))


def test_a_merged_task_lora_stays_on(base_model, batch) -> None:
    merged = get_peft_model(base_model("bert-classifier"), LoraConfig(**LORA)).merge_and_unload()
    wanted = logits(merged, batch)
    assert teacher_logits(get_peft_model(merged, VariatorConfig(init_weights=False)), batch).equal(wanted)


def shifted_head(model: nn.Module, adapter: str = "default") -> None:
    """Make the saved head of an adapter differ from the one it was copied from."""
    for name, parameter in model.named_parameters():
        if f"modules_to_save.{adapter}" in name:
            parameter.data += 1.0


def test_the_head_of_a_task_lora_stays_on(base_model, batch, tmp_path: Path) -> None:
    task = get_peft_model(base_model("bert-classifier"), LoraConfig(**LORA, modules_to_save=["classifier"]))
    shifted_head(task)
    with_head = logits(task, batch)
    task.save_pretrained(tmp_path)
    base = base_model("bert-classifier")
    base.load_adapter(tmp_path)
    model = get_peft_model(base, VariatorConfig(init_weights=False))
    assert teacher_logits(model, batch).equal(with_head)


def test_adapters_that_the_base_came_with_are_frozen(base_model, batch, tmp_path: Path) -> None:
    """PEFT's own methods leave them as they are, and heads trainable even where they were loaded for inference."""
    task = get_peft_model(base_model("bert-classifier"), LoraConfig(**LORA, modules_to_save=["classifier"]))
    shifted_head(task)
    with_head = logits(task, batch)
    task.save_pretrained(tmp_path)
    base = base_model("bert-classifier")
    base.load_adapter(tmp_path, is_trainable=True)
    model = get_peft_model(base, IA3Config(target_modules=["key"], feedforward_modules=[], init_ia3_weights=False))
    with pytest.warns(UserWarning, match="5 layers with trainable adapters that the base model came with are frozen"):
        assert teacher_logits(model, batch).equal(with_head)
    assert all("ia3_" in name for name, flag in flags(model).items() if flag)
    with model.disable_adapter():
        assert not logits(model, batch).equal(with_head), "PEFT's own switch would do"


def test_a_head_that_is_trained_is_not_the_teachers(base_model, plugin_model, batch) -> None:
    model = plugin_model("bert-classifier", init_weights=False, modules_to_save=["classifier"])
    shifted_head(model)
    assert teacher_logits(model, batch).equal(logits(base_model("bert-classifier"), batch))


def test_of_several_active_adapters_only_the_trained_one_is_off(base_model, batch) -> None:
    model = get_peft_model(base_model("bert-classifier"), LoraConfig(**LORA), adapter_name="kept")
    kept = logits(model, batch)
    model.add_adapter("trained", LoraConfig(**LORA))
    model.base_model.set_adapter(["kept", "trained"])
    model.set_requires_grad("kept", False)
    assert teacher_logits(model, batch).equal(kept)
    assert model.base_model.active_adapters == ["kept", "trained"]


def test_trainable_tokens_are_switched_off(base_model, batch) -> None:
    config = LoraConfig(**LORA, trainable_token_indices={"word_embeddings": [5, 6, 7, 8, 9, 10, 11, 12]})
    model = get_peft_model(base_model("bert-classifier"), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1.0
    assert teacher_logits(model, batch).equal(logits(base_model("bert-classifier"), batch))


def test_an_error_in_the_teacher_switches_everything_on_again(plugin_model, batch) -> None:
    model = plugin_model("bert-classifier", init_weights=False)
    before, student = flags(model), logits(model, batch)
    with pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"):
        InPlaceTeacher(model, TrainedAdapters(model)).outputs(model, {**batch, "inputs_embeds": torch.zeros(3, 4, 16)})
    assert flags(model) == before
    assert logits(model, batch).equal(student)


def test_without_a_trainable_adapter_there_is_no_student(base_model, plugin_model) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification has no trainable adapter.*is_trainable=True"):
        TrainedAdapters(base_model("bert-classifier"))
    frozen = plugin_model("bert-classifier").requires_grad_(False)
    with pytest.raises(ValueError, match="has no trainable adapter"):
        TrainedAdapters(frozen)


def test_a_teacher_that_would_be_trained_too_is_refused(plugin_model) -> None:
    model = plugin_model("bert-classifier")
    model.get_base_model().classifier.bias.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"1 trainable parameters belong to no adapter .*classifier.bias'.*modules_to_save"
    ):
        InPlaceTeacher(model, TrainedAdapters(model))


def test_a_separate_teacher_is_frozen(base_model, plugin_model, batch) -> None:
    teacher = base_model("bert-classifier").train()
    outputs = SeparateTeacher(teacher, plugin_model("bert-classifier")).outputs(nn.Linear(1, 1), batch)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert outputs["logits"].equal(logits(base_model("bert-classifier"), batch))


def test_a_separate_teacher_shares_nothing_that_is_trained(plugin_model) -> None:
    model = plugin_model("bert-classifier")
    with pytest.raises(ValueError, match="shares trainable parameters with the student"):
        SeparateTeacher(model, model)
    SeparateTeacher(copy.deepcopy(model), model)


def with_dropout(rate: float) -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_model("bert-sequence", **TEXT, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)


def noise(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """How much the output changes from call to call in the mode the model is in."""
    torch.manual_seed(1)
    first = model(**batch).logits
    return (model(**batch).logits - first).abs().max().item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_has_no_dropout(batch, attention: str, checkpointing: bool) -> None:
    base = with_dropout(0.5)
    base.set_attn_implementation(attention)
    model = get_peft_model(base, VariatorConfig(init_weights=False)).train()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    assert noise(model, batch) > 0
    TrainedAdapters(model).train_alone(model)
    assert noise(model, batch) == 0
    assert all(layer.training == checkpointing for layer in base.bert.encoder.layer)


def test_only_the_trained_adapter_keeps_its_dropout(batch) -> None:
    base = with_dropout(0.0)
    base.add_adapter(LoraConfig(**LORA, lora_dropout=0.5))
    model = get_peft_model(base, VariatorConfig(init_weights=False)).train()
    TrainedAdapters(model).train_alone(model)
    assert noise(model, batch) == 0
    trained = get_peft_model(with_dropout(0.0), LoraConfig(**LORA, lora_dropout=0.5)).train()
    TrainedAdapters(trained).train_alone(trained)
    assert noise(trained, batch) > 0


def test_checkpointed_layers_with_dropout_of_their_own_are_refused() -> None:
    model = get_peft_model(tiny_model("bart", dropout=0.1), VariatorConfig())
    adapters = TrainedAdapters(model)
    adapters.train_alone(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        ValueError, match=r"layers.0 \(BartEncoderLayer\) applies dropout by itself.*base_dropout=True"
    ):
        adapters.train_alone(model)


def test_only_what_is_trained_is_in_training_mode(plugin_model: Callable[..., PeftModel]) -> None:
    model = plugin_model("bert-classifier").train()
    TrainedAdapters(model).train_alone(model)
    training = {name for name, module in model.named_modules() if module.training}
    assert training
    assert all("variator_" in name or name.endswith("intermediate") for name in training)
