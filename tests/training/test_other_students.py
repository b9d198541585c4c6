"""Students other than a Variator plugin on a PEFT model: SparseLoRA, and adapters added by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from training_cases import build_base, collate_batch, make_examples
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_variator import SparseLoraConfig, VariatorConfig, attach_masks
from peft_variator.training import DistillationTrainer


TARGETS = ["q_proj", "v_proj", "up_proj"]
# (1 - λ) · task + λ · KL at T = 1, as He et al. 2024 train it.
RESTORING = {"hidden_weight": 0.0, "task_weight": 0.9, "logits_weight": 0.1, "learning_rate": 1e-2}


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which weights to keep: the larger half of every target."""
    weights = {name: module.weight for name, module in model.named_modules() if name.endswith(tuple(TARGETS))}
    return {name: weight.abs() > weight.abs().median() for name, weight in weights.items()}


@pytest.fixture
def trainer(arguments):
    """Builds a trainer of the causal model's examples."""

    def build(model: nn.Module, teacher_model: nn.Module | None = None, **fields) -> DistillationTrainer:
        return DistillationTrainer(
            model,
            arguments(**{"max_steps": 20, "per_device_train_batch_size": 16, **fields}),
            teacher_model=teacher_model,
            train_dataset=make_examples("llama"),
            data_collator=collate_batch,
        )

    return build


def test_sparse_lora_follows_the_dense_model_it_stores(trainer) -> None:
    base = build_base("llama")
    masks = masks_of(base)
    model = get_peft_model(base, SparseLoraConfig(r=2, mask="stored", target_modules=TARGETS))
    attach_masks(model, masks)
    run = trainer(model, **RESTORING)
    batch = collate_batch(make_examples("llama", count=3))
    teacher = run.teacher.outputs(model, batch)["logits"]
    assert teacher.equal(build_base("llama").eval()(**batch).logits)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run.train()
    for name, value in model.named_parameters():
        assert value.equal(before[name]) != ("sparse_low_rank_" in name), name
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_sparse_lora_on_a_sparse_base_follows_a_dense_teacher(trainer) -> None:
    base = build_base("llama")
    for name, mask in masks_of(base).items():
        base.get_submodule(name).weight.data[~mask] = 0
    model = get_peft_model(base, SparseLoraConfig(r=2, target_modules=TARGETS))
    run = trainer(model, teacher_model=build_base("llama"), **RESTORING)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    for name, mask in masks_of(build_base("llama")).items():
        assert not merged.get_submodule(name).weight[~mask].any()


def test_an_adapter_that_transformers_added(trainer, tmp_path: Path) -> None:
    base: PreTrainedModel = build_base("llama")
    base.add_adapter(VariatorConfig(bottleneck_dim=4))
    run = trainer(base, max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path), ratios=[2, 4])
    before = {name: value.clone() for name, value in base.named_parameters()}
    run.train()
    moved = {name for name, value in base.named_parameters() if not value.equal(before[name])}
    assert moved == {name for name in before if "variator_" in name}
    build_base("llama").save_pretrained(tmp_path / "base")
    # Of a model that FSDP has spread over processes the adapters alone are gathered, and saved the same.
    run.is_fsdp_enabled = True
    gathered = run.gather_adapters()
    assert gathered is not None
    assert gathered.keys() == {name for name in base.state_dict() if "variator_" in name}
    base.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    for folder in ("checkpoint-4", "gathered"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded.load_adapter(tmp_path / folder)
        for name, value in loaded.named_parameters():
            assert value.equal(dict(base.named_parameters())[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_quantised_student_learns_from_the_same_without_plugin(arguments, name: str) -> None:
    """Every part of the plugin, that of the first layer included, though torch's int8 layers give no gradients."""
    base = torch.ao.quantization.quantize_dynamic(build_base(name), {nn.Linear}, dtype=torch.qint8)
    config = VariatorConfig(init_weights=False, correction_dim=8, compensation_rank=2)
    student = get_peft_model(base, config)
    before = {key: value.clone() for key, value in student.named_parameters() if "variator_" in key}
    trainer = DistillationTrainer(
        student,
        arguments(max_steps=20, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=1),
        train_dataset=make_examples(name),
        data_collator=collate_batch,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    after = dict(student.named_parameters())
    assert all((after[key] - value).abs().max() > 1e-4 for key, value in before.items())
