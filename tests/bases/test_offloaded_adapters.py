"""Adapters above packed layers that a device map put somewhere: inference works, training above offloaded ones not."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from .models import ON_DISK, contents, logits, tiny_llama
from .reference import same_bits
from .test_adapters import CONFIGS, IDS, LABELS, adapted, gradients


METHODS = ["sparse_lora", "lora", "variator"]


def on_disk(folder):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=ON_DISK)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_inference_and_training_with_a_device_map(packed_dir, tmp_path, device_map, method):
    dense = adapted(tiny_llama(), CONFIGS[method])
    dense.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(packed_dir, device_map=device_map)
    packed = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert same_bits(logits(packed), logits(dense))
    wanted, actual = gradients(dense), gradients(packed)
    assert wanted.keys() == actual.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in wanted.items())


def test_inference_with_an_adapter_above_layers_on_disk(packed_dir):
    before = contents(packed_dir)
    packed = adapted(on_disk(packed_dir), CONFIGS["sparse_lora"])
    assert packed.base_model.model.model.layers[1].mlp.up_proj.base_layer.compressed.is_meta
    assert same_bits(logits(packed), logits(adapted(tiny_llama(), CONFIGS["sparse_lora"])))
    assert contents(packed_dir) == before


@pytest.mark.parametrize("method", METHODS)
def test_training_above_offloaded_layers_is_refused_with_the_reason(packed_dir, method):
    before = contents(packed_dir)
    model = get_peft_model(on_disk(packed_dir), copy.deepcopy(CONFIGS[method])).train()
    with pytest.raises(RuntimeError, match=r"offloaded, and above offloaded .* nothing is trained: .* Load the model"):
        model(input_ids=IDS, labels=LABELS)
    assert contents(packed_dir) == before


def test_a_trainer_is_refused_before_its_first_step(packed_dir, tmp_path):
    model = get_peft_model(on_disk(packed_dir), copy.deepcopy(CONFIGS["sparse_lora"]))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    rows = [{"input_ids": IDS[0], "labels": LABELS[0]}] * 2
    weights = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    with pytest.raises(RuntimeError, match="nothing is trained"):
        Trainer(model, arguments, train_dataset=rows).train()
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters() if value.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_loading_an_adapter_onto_layers_on_disk_leaves_the_files_alone(packed_dir, tmp_path, method):
    adapted(tiny_llama(), CONFIGS[method]).save_pretrained(tmp_path / "adapter")
    before = contents(packed_dir)
    with pytest.raises(ValueError, match="stopped before it wrote anything"):
        PeftModel.from_pretrained(on_disk(packed_dir), tmp_path / "adapter")
    assert contents(packed_dir) == before
