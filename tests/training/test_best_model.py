"""`load_best_model_at_end` gives back the adapter of the best step, whatever its name and what lies beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from training_cases import build_base, collate_batch, make_examples
from transformers import TrainerCallback

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.training import DistillationTrainer


class BestAt(TrainerCallback):
    """Says that the model of a step was the best one, and keeps what was trained by then."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self.model, self.step, self.weights = model, step, dict[str, Tensor]()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_best"] = float(state.global_step == self.step)
        if state.global_step == self.step:
            self.weights = {name: value.clone() for name, value in self.model.named_parameters()}


def train(model: nn.Module, arguments: Callable, folder: Path) -> dict[str, Tensor]:
    """Train for 4 steps, the third of which is said to be the best, and check that the model is the one of then."""
    best = BestAt(model, step=3)
    start = {name: value.clone() for name, value in model.named_parameters()}
    args = arguments(
        output_dir=str(folder),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="best",
        greater_is_better=True,
        learning_rate=1e-2,
    )
    trainer = DistillationTrainer(
        model,
        args,
        train_dataset=make_examples("bert"),
        eval_dataset=make_examples("bert", count=4),
        data_collator=collate_batch,
        callbacks=[best],
    )
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    assert trainer.state.best_global_step == 3
    after = dict(model.named_parameters())
    assert {name for name in after if not after[name].equal(start[name])} == trained
    assert {name for name in after if not after[name].equal(best.weights[name])} == set()
    assert {name for name, value in after.items() if value.requires_grad} == trained
    return after


CONFIGS = {
    "variator": lambda: VariatorConfig(bottleneck_dim=4),
    "sparse_lora": lambda: SparseLoraConfig(r=2, target_modules=["query", "value"]),
    "lora": lambda: LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False),
}


@pytest.mark.parametrize("name", ["default", "compressed", "a name"])
@pytest.mark.parametrize("method", CONFIGS)
def test_of_any_method_and_name(arguments, tmp_path: Path, method: str, name: str) -> None:
    model = get_peft_model(build_base("bert"), CONFIGS[method](), adapter_name=name)
    for key, value in model.named_parameters():
        if "low_rank_B" in key:
            nn.init.normal_(value)  # a fresh one follows its teacher perfectly
    train(model, arguments, tmp_path)


@pytest.mark.parametrize("trained", ["default", "second"])
def test_beside_another_adapter(arguments, tmp_path: Path, trained: str) -> None:
    model = get_peft_model(build_base("bert"), VariatorConfig(bottleneck_dim=4, init_weights=False))
    model.add_adapter("second", VariatorConfig(bottleneck_dim=4, init_weights=False))
    model.set_adapter(trained)
    train(model, arguments, tmp_path)


def test_with_a_module_that_is_saved_whole(arguments, tmp_path: Path) -> None:
    config = VariatorConfig(bottleneck_dim=4, modules_to_save=["encoder.layer.1.output.LayerNorm"])
    train(get_peft_model(build_base("bert"), config, adapter_name="compressed"), arguments, tmp_path)


@pytest.mark.parametrize("name", ["default", "compressed"])
def test_of_a_model_whose_adapter_transformers_added(arguments, tmp_path: Path, name: str) -> None:
    model = build_base("bert")
    model.add_adapter(VariatorConfig(bottleneck_dim=4), adapter_name=name)
    train(model, arguments, tmp_path)


def test_what_it_gives_is_what_the_checkpoint_holds(arguments, tmp_path: Path) -> None:
    model = get_peft_model(build_base("bert"), VariatorConfig(bottleneck_dim=4), adapter_name="compressed")
    weights = train(model, arguments, tmp_path)
    loaded = PeftModel.from_pretrained(
        build_base("bert"), tmp_path / "checkpoint-3" / "compressed", adapter_name="compressed"
    )
    assert all(value.equal(weights[name]) for name, value in loaded.named_parameters())
