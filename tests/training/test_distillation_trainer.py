"""Runs of the trainer on tiny models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    BertConfig,
    BertForQuestionAnswering,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    default_data_collator,
)

from peft_variator import VariatorConfig, using_ratio
from peft_variator.training import DistillationTrainer
from peft_variator.tuners.variator import VariatorLayer
from tests.tiny_models import BY_NAME, tiny_model
from tests.training.training_cases import make_examples


ALL_LOSSES = {"hidden_weight": 1.0, "logits_weight": 0.5, "task_weight": 0.3}
# What each kind of model can be trained for.
WEIGHTS: dict[str, dict[str, Any]] = {
    "bert": {"embedding_weight": 0.7},
    "bert-classifier": ALL_LOSSES,
    "gpt2": ALL_LOSSES,
    "llama": ALL_LOSSES,
    "t5": ALL_LOSSES,
    "vit": ALL_LOSSES | {"embedding_weight": 0.7, "embedding_pooling": "first"},
}


@pytest.fixture
def trainer(plugin_model, examples, collate, arguments) -> Callable[..., DistillationTrainer]:
    """Builds a trainer for a model by name, or for a model that is passed."""

    def build(name: str, model: nn.Module | None = None, **fields: Any) -> DistillationTrainer:
        extra = {key: fields.pop(key) for key in list(fields) if key in EXTRA}
        data = examples(name, labels=fields.get("task_weight", 0) > 0 or name in ("gpt2", "llama", "t5"))
        return DistillationTrainer(
            plugin_model(name) if model is None else model,
            arguments(**fields),
            **{"train_dataset": data, "data_collator": collate, **extra},
        )

    return build


EXTRA = {"callbacks", "compute_loss_func", "compute_metrics", "data_collator", "eval_dataset", "teacher_model"} | {
    "train_dataset"
}


def logged(trainer: DistillationTrainer, name: str = "loss") -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_plugin_parameter_moves_and_no_other_does(trainer, name: str) -> None:
    run = trainer(name, **WEIGHTS[name], max_steps=6)
    before = parameters(run.model)
    buffers = {key: value.clone() for key, value in run.model.named_buffers()}
    run.train()
    for key, value in run.model.named_parameters():
        assert value.equal(before[key]) != ("variator_" in key), key
    assert all(value.equal(buffers[key]) for key, value in run.model.named_buffers())
    assert all(torch.isfinite(torch.tensor(logged(run))))


@pytest.mark.parametrize("name", WEIGHTS)
def test_losses_fall_and_parts_add_up(trainer, name: str) -> None:
    run = trainer(name, **WEIGHTS[name], max_steps=40, learning_rate=1e-2, per_device_train_batch_size=16)
    run.train()
    losses = logged(run)
    assert losses[-1] < losses[0]
    parts = {key: logged(run, f"{key}_loss") for key in run.terms}
    for step, loss in enumerate(losses):
        total = sum(run.terms[key].weight * values[step] for key, values in parts.items())
        assert total == pytest.approx(loss, rel=1e-5)


def test_the_parts_are_named_by_what_they_compare(trainer) -> None:
    assert list(trainer("bert").terms) == ["hidden"]
    assert list(trainer("t5", **ALL_LOSSES).terms) == ["encoder_hidden", "decoder_hidden", "logits", "task"]


@pytest.mark.parametrize("hidden_loss", ["last", "all"])
def test_the_first_loss_is_that_of_a_plain_loop(
    trainer, base_model, plugin_model, examples, collate, hidden_loss
) -> None:
    """The whole path, written down again: teacher, variance, mask, layers, tokens."""
    data = examples("bert", count=4)
    run = trainer("bert", max_steps=1, hidden_loss=hidden_loss, train_dataset=data)
    run.train()
    rows = [collate([example]) for example in data]
    with torch.no_grad():
        teacher = [base_model("bert").eval()(**row, output_hidden_states=True).hidden_states for row in rows]
        student = [plugin_model("bert").eval()(**row, output_hidden_states=True).hidden_states for row in rows]
    layers = [2] if hidden_loss == "last" else [1, 2]
    wanted = 0.0
    for layer in layers:
        target = torch.cat([states[layer][0] for states in teacher])
        error = torch.cat([states[layer][0] for states in student]) - target
        wanted += float(error.square().mean() / (target - target.mean(0)).square().mean()) / len(layers)
    assert logged(run)[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "gpt2", "t5", "vit"])
def test_accumulation_does_not_change_a_step(trainer, plugin_model, name: str) -> None:
    """Eight uneven sequences as one batch, as 2 × 4, as 4 × 2 and as 8 × 1 give the same losses and weights."""
    results = []
    for size in (8, 4, 2, 1):
        run = trainer(
            name,
            plugin_model(name, init_weights=False).double(),
            **WEIGHTS[name],
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        run.train()
        results.append((logged(run), parameters(run.model)))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(weights, results[0][1], rtol=1e-6, atol=1e-9)


def test_the_last_accumulated_batch_of_an_epoch_may_be_short(trainer, examples, plugin_model) -> None:
    results = []
    for size in (4, 1):
        run = trainer(
            "gpt2",
            plugin_model("gpt2", init_weights=False).double(),
            **ALL_LOSSES,
            max_steps=3,
            optim="sgd",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            train_dataset=examples("gpt2", count=6),
        )
        run.train()
        results.append((logged(run), parameters(run.model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_more_padding_changes_nothing(trainer, plugin_model, collate, name: str) -> None:
    def wasteful(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {key: nn.functional.pad(value, (0, 9), value=fill[key]) for key, value in collate(batch).items()}

    results = []
    for collator in (collate, wasteful):
        run = trainer(
            name,
            plugin_model(name, init_weights=False).double(),
            logits_weight=0.5 if name == "t5" else 0.0,
            optim="sgd",
            data_collator=collator,
        )
        run.train()
        results.append((logged(run), parameters(run.model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-6, atol=1e-9)


def test_a_micro_batch_without_labels_adds_nothing(trainer, plugin_model, examples) -> None:
    data = examples("llama", count=4)
    data[0]["labels"] = [-100] * len(data[0]["input_ids"])
    results = []
    for size in (4, 1):
        run = trainer(
            "llama",
            plugin_model("llama", init_weights=False).double(),
            task_weight=1.0,
            max_steps=2,
            optim="sgd",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            train_dataset=data,
        )
        run.train()
        results.append(logged(run, "task_loss"))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_orders_by_length_are_those_of_seed_and_epoch(trainer) -> None:
    run = trainer("bert", train_sampling_strategy="group_by_length")
    sampler = run._get_train_sampler()
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(len(sampler)))
    assert first != list(sampler)


def test_checkpointing_switches_caches_off(trainer) -> None:
    """A decoder's layer that runs again in the backward pass would find its keys in the cache."""
    model = get_peft_model(tiny_model("t5gemma"), VariatorConfig(compression_ratio=2))
    examples = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [4, 5, 6, 7]}] * 4
    losses = []
    for checkpointing in (True, False):
        fields = {"gradient_checkpointing": checkpointing, "train_dataset": examples, "max_steps": 1}
        run = trainer("t5", model, **fields, learning_rate=0.0, data_collator=default_data_collator, fit_samples=0)
        run.train()
        losses.append(logged(run)[0])
    assert losses[0] == pytest.approx(losses[1])


def test_tokens_with_several_streams_are_compared_side_by_side(trainer) -> None:
    model = get_peft_model(tiny_model("gemma3n"), VariatorConfig(compression_ratio=2))
    examples = [{"input_ids": list(range(5, 17))}] * 4
    run = trainer("llama", model, max_steps=1, train_dataset=examples, data_collator=default_data_collator)
    run.train()
    assert 0 < logged(run)[0] < 1


def test_the_best_checkpoint_by_a_loss_at_one_ratio_is_that_with_the_lowest(trainer, tmp_path: Path) -> None:
    fields = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    fields |= {"metric_for_best_model": "loss_k4", "load_best_model_at_end": True, "ratios": [2, 4]}
    data = make_examples("bert", 8)
    run = trainer("bert", **fields, output_dir=str(tmp_path), eval_dataset=data, learning_rate=0.02)
    run.train()
    assert run.state.best_metric == min(logged(run, "eval_loss_k4"))


def random_lora(model: nn.Module, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["query", "value"], **fields}))


@pytest.mark.parametrize("kind", ["ratios", "dropout", "lengths"])
def test_resuming_gives_the_same_losses(trainer, base_model, plugin_model, tmp_path: Path, kind: str) -> None:
    def run(**fields: Any) -> DistillationTrainer:
        extra: dict[str, Any]
        if kind == "ratios":
            model, extra = plugin_model("bert"), {"ratios": [2, 4, 8]}
        elif kind == "lengths":  # step 3 of 6 is in the second epoch of two steps
            model, extra = plugin_model("bert"), {"train_sampling_strategy": "group_by_length"}
            extra["train_dataset"] = make_examples("bert", 8)
        else:
            model, extra = random_lora(base_model("bert"), lora_dropout=0.5, init_lora_weights=False), {}
        fields |= {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        return trainer("bert", model, **fields, **extra, gradient_accumulation_steps=2, per_device_train_batch_size=2)

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert len(set(logged(whole))) == 6
    torch.testing.assert_close(parameters(resumed.model), parameters(whole.model), rtol=0, atol=0)


def test_evaluation_does_not_depend_on_the_batches(trainer, examples) -> None:
    held_out = examples("t5", count=7, seed=1)
    results = []
    for size in (1, 3, 7):
        run = trainer("t5", **ALL_LOSSES, per_device_eval_batch_size=size, eval_dataset=held_out)
        results.append(run.evaluate())
    names = ["eval_loss", "eval_encoder_hidden_loss", "eval_decoder_hidden_loss", "eval_logits_loss", "eval_task_loss"]
    for result in results[1:]:
        assert [result[name] for name in names] == pytest.approx([results[0][name] for name in names], rel=1e-5)
    total = results[0]["eval_encoder_hidden_loss"] + results[0]["eval_decoder_hidden_loss"]
    total += 0.5 * results[0]["eval_logits_loss"] + 0.3 * results[0]["eval_task_loss"]
    assert results[0]["eval_loss"] == pytest.approx(total)


def test_evaluation_alone_measures_variances_on_its_own_data(plugin_model, arguments, examples, collate) -> None:
    run = DistillationTrainer(plugin_model("bert"), arguments(), data_collator=collate)
    held_out = examples("bert", count=5)
    loss = run.evaluate(held_out)["eval_loss"]
    assert 0 < loss < 10
    again = DistillationTrainer(plugin_model("bert"), arguments(), data_collator=collate, eval_dataset=held_out)
    assert again.evaluate()["eval_loss"] == pytest.approx(loss)
    with pytest.raises(ValueError, match="pass train_dataset or eval_dataset"):
        DistillationTrainer(plugin_model("bert"), arguments()).compute_loss(plugin_model("bert"), {})


def test_the_best_model_is_loaded_at_the_end(trainer, examples, tmp_path: Path) -> None:
    run = trainer(
        "bert",
        output_dir=str(tmp_path),
        max_steps=12,
        learning_rate=1.0,
        warmup_steps=12,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        eval_dataset=examples("bert", count=6, seed=1),
    )
    run.train()
    evaluated = logged(run, "eval_loss")
    assert len(evaluated) == 6
    assert run.state.best_metric == min(evaluated)
    best = load_file(
        tmp_path / f"checkpoint-{2 * (evaluated.index(min(evaluated)) + 1)}" / "adapter_model.safetensors"
    )
    assert evaluated[-1] != min(evaluated), "the run has to end worse than it was for this to test anything"
    for name, value in run.model.named_parameters():
        if "variator_" in name:
            assert value.equal(best[name.replace(".default", "")])
    assert run.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)


class Recorder(TrainerCallback):
    """Records the ratio that every micro-batch ran at, by step."""

    def __init__(self) -> None:
        self.ratios: dict[int, list[int]] = {}

    def record(self, model: nn.Module, step: int) -> None:
        layers = [module for module in model.modules() if isinstance(module, VariatorLayer)]
        (ratio,) = {layer.rule_at("default", layer.ratios.chosen.get("default")).ratio for layer in layers}
        self.ratios.setdefault(step, []).append(ratio)

    def on_substep_end(self, args, state, control, model, **kwargs) -> None:
        self.record(model, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.record(model, state.global_step)


def test_one_ratio_a_step_drawn_from_the_seed(trainer, plugin_model, examples) -> None:
    recorded = []
    for seed in (1, 1, 2):
        recorder = Recorder()
        run = trainer(
            "bert",
            plugin_model("bert", compression_ratio=3, ratio_pattern={"layer.1.intermediate": 5}),
            ratios=[2, 4, 8],
            seed=seed,
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            callbacks=[recorder],
            eval_strategy="steps",
            eval_steps=3,
            eval_dataset=examples("bert", count=3, seed=1),
        )
        run.train()
        recorded.append(recorder.ratios)
        layers = [module for module in run.model.modules() if isinstance(module, VariatorLayer)]
        rules = [layer.rule_at("default", layer.ratios.chosen.get("default")).ratio for layer in layers]
        assert rules == [3, 5], "the plugin has its own ratios again"
    assert recorded[0] == recorded[1] != recorded[2]
    assert all(len(ratios) == 2 and len(set(ratios)) == 1 for ratios in recorded[0].values())
    assert {ratio for ratios in recorded[0].values() for ratio in ratios} == {2, 4, 8}


def test_several_ratios_are_evaluated_one_by_one(trainer, examples) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (6, 3), "logits only"
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    fields = {**ALL_LOSSES, "eval_dataset": examples("bert-classifier", count=6, seed=1), "compute_metrics": accuracy}
    several = trainer("bert-classifier", ratios=[8, 2], **fields).evaluate()
    for name in ("loss", "hidden_loss", "logits_loss", "task_loss", "accuracy"):
        single = []
        for ratio in (2, 8):
            run = trainer("bert-classifier", **fields)
            run.model.set_compression_ratio(ratio)
            single.append(run.evaluate()[f"eval_{name}"])
            assert several[f"eval_{name}_k{ratio}"] == pytest.approx(single[-1])
        assert several[f"eval_{name}"] == pytest.approx(sum(single) / 2)


def test_metrics_that_are_no_numbers_have_no_mean(trainer, examples) -> None:
    def report(prediction: Any) -> dict[str, Any]:
        return {"share": np.float32(0.5), "by_class": [0.1, 0.2], "report": {"class 0": {"f1": 0.3}}}

    fields = {**ALL_LOSSES, "eval_dataset": examples("bert-classifier", count=4), "compute_metrics": report}
    found = trainer("bert-classifier", ratios=[2, 8], **fields).evaluate()
    assert found["eval_share"] == 0.5
    assert "eval_report" not in found
    assert "eval_by_class" not in found
    for ratio in (2, 8):
        assert found[f"eval_report_k{ratio}"] == {"class 0": {"f1": 0.3}}
        assert found[f"eval_by_class_k{ratio}"] == [0.1, 0.2]


def test_ratios_are_not_taken_by_turns_inside_of_a_block_of_one(trainer, examples) -> None:
    """The block's ratio would count, under the names of all of them."""
    data = examples("bert", count=4)
    several, one = trainer("bert", ratios=[2, 8], eval_dataset=data), trainer("bert", eval_dataset=data)
    with using_ratio(several.model, 8):
        with pytest.raises(ValueError, match=r"by turns, stands inside of a using_ratio block\. Call it outside"):
            several.evaluate()
        with pytest.raises(ValueError, match="train stands inside of a using_ratio block"):
            several.train()
    one.model.set_compression_ratio(8)
    wanted = one.evaluate()["eval_loss"]
    one.model.set_compression_ratio(2)
    with using_ratio(one.model, 8):
        assert one.evaluate()["eval_loss"] == pytest.approx(wanted)


def test_prediction_uses_the_ratio_that_is_set(trainer, examples) -> None:
    run = trainer("bert-classifier", ratios=[2, 8], **ALL_LOSSES)
    test_set = examples("bert-classifier", count=3)
    run.model.set_compression_ratio(1)
    output = run.predict(test_set)
    assert output.predictions.shape == (3, 3)
    assert output.metrics["test_hidden_loss"] == pytest.approx(0, abs=1e-9)


def test_predictions_without_labels(trainer, examples) -> None:
    run = trainer("bert-classifier", logits_weight=1.0)
    output = run.predict(examples("bert-classifier", count=3, labels=False))
    assert output.predictions.shape == (3, 3)
    assert output.label_ids is None
    assert output.metrics["test_logits_loss"] > 0


def test_lora_learns_a_task_and_follows_its_dense_self(trainer, base_model) -> None:
    """(1 - λ) · task + λ · KL, as for SparseLoRA; the teacher is the base without the adapter."""
    model = random_lora(base_model("bert-classifier"), init_lora_weights=False)
    run = trainer("bert-classifier", model, hidden_weight=0.0, logits_weight=0.1, task_weight=0.9, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    base = base_model("bert-classifier").eval()(**batch)
    student = copy.deepcopy(model).eval()(**batch)
    kl = nn.functional.kl_div(
        student.logits.log_softmax(-1), base.logits.log_softmax(-1), log_target=True, reduction="sum"
    )
    wanted = 0.9 * student.loss + 0.1 * kl / len(batch["labels"])
    assert run.compute_loss(model.eval(), batch).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_separate_teacher_is_followed(trainer, base_model) -> None:
    pruned = base_model("bert")
    for parameter in pruned.encoder.parameters():
        parameter.data[parameter.abs() < 0.2] = 0
    teacher = base_model("bert")
    run = trainer("bert", random_lora(pruned), teacher_model=teacher, max_steps=30, learning_rate=1e-2)
    run.train()
    assert logged(run)[0] > 0.01
    assert logged(run)[-1] < logged(run)[0]
    assert all(value.equal(teacher.state_dict()[name]) for name, value in base_model("bert").state_dict().items())


def test_a_base_with_dropout_is_followed_without_noise(trainer, plugin_model) -> None:
    first = []
    for rate, base_dropout in ((0.0, False), (0.5, False), (0.5, True)):
        model = plugin_model("bert")
        for module in model.get_base_model().modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
        run = trainer("bert", model, max_steps=1, base_dropout=base_dropout)
        run.train()
        first.append(logged(run)[0])
    assert first[0] == first[1]
    assert first[2] > 2 * first[0]


def test_gradient_checkpointing_changes_nothing(trainer, plugin_model) -> None:
    results = []
    for checkpointing in (False, True):
        run = trainer("bert", activation_checkpointing=checkpointing)
        run.train()
        results.append((logged(run), parameters(run.model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [True, False])
def test_the_trainers_own_losses_are_task_losses(trainer, plugin_model, smoothing: bool) -> None:
    def mine(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert num_items_in_batch is None
        losses = nn.functional.cross_entropy(outputs["logits"], labels, reduction="none", label_smoothing=0.2)
        return losses.mean()

    extra = {"label_smoothing_factor": 0.2} if smoothing else {"compute_loss_func": mine}
    results = []
    for size in (8, 2):
        run = trainer(
            "bert-classifier",
            hidden_weight=0.0,
            task_weight=1.0,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **extra,
        )
        assert run.teacher is None, "there is nothing to follow"
        run.train()
        results.append(logged(run))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    model = plugin_model("bert-classifier").eval()
    batch = next(iter(trainer("bert-classifier", task_weight=1.0).get_train_dataloader()))
    got = run.compute_loss(model, batch).item()
    assert got == pytest.approx(mine(model(**batch), batch["labels"]).item(), rel=1e-5)


def test_a_loss_function_gets_no_labels_where_there_is_no_such_column(trainer) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    base = BertForQuestionAnswering(BertConfig(vocab_size=60, **sizes))
    rows = [
        {"input_ids": list(range(5, 17)), "start_positions": start, "end_positions": start + 2} for start in range(4)
    ]
    seen = []

    def mine(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        seen.append(labels)
        return outputs["loss"]

    for extra in ({"compute_loss_func": mine}, {"label_smoothing_factor": 0.1}):
        model = get_peft_model(copy.deepcopy(base), VariatorConfig(compression_ratio=2))
        fields = {"train_dataset": rows, "data_collator": default_data_collator, "hidden_weight": 0.0}
        run = trainer("bert", model, task_weight=1.0, max_steps=1, **fields, **extra)
        run.train()
        assert logged(run)[0] > 0
    assert seen == [None] * len(seen)
    assert seen


@pytest.mark.parametrize("kind", ["segmentation", "ctc", "ctc by its sum"])
def test_accumulation_does_not_change_losses_that_count_otherwise(trainer, kind: str) -> None:
    """Segmentation leaves out the label 255, CTC has one loss an example, however long its text is."""
    torch.manual_seed(0)
    if kind == "segmentation":
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        pictures = {"image_size": 16, "patch_size": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
        parts = {"use_auxiliary_head": False, "use_mask_token": False, "drop_path_rate": 0.0, "initializer_range": 0.4}
        base = BeitForSemanticSegmentation(BeitConfig(**sizes, **pictures, **parts, num_labels=4))
        rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.randint(0, 4, (16, 16))} for _ in range(4)]
        for row in rows[2:]:
            row["labels"][1:] = 255
    else:
        convolutions = {"conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4]}
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
        config = Wav2Vec2Config(
            **sizes,
            **convolutions,
            vocab_size=12,
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            ctc_loss_reduction="sum" if kind == "ctc by its sum" else "mean",
            ctc_zero_infinity=True,
            mask_time_prob=0.0,
            layerdrop=0.0,
        )
        base = Wav2Vec2ForCTC(config)
        labels = [[3, 4, 5, 6, 7], [3, -100, -100, -100, -100], [8, 9, -100, -100, -100], [5, 4, 3, 10, -100]]
        rows = [{"input_values": torch.randn(400), "labels": torch.tensor(each)} for each in labels]
    results = []
    for size in (4, 2, 1):
        config = VariatorConfig(compression_ratio=2, correction_dim=4, init_weights=False)
        torch.manual_seed(1)
        run = trainer(
            "vit",
            get_peft_model(copy.deepcopy(base).double(), config),
            hidden_weight=0.0,
            task_weight=1.0,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            train_dataset=[{k: v.double() if v.is_floating_point() else v for k, v in row.items()} for row in rows],
            data_collator=default_data_collator,
        )
        run.train()
        results.append((logged(run, "task_loss"), {k: v for k, v in parameters(run.model).items() if "variator" in k}))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(weights, results[0][1], rtol=1e-4, atol=1e-6)


class Stream(IterableDataset):
    def __init__(self, data: list[dict[str, Any]]) -> None:
        self.data = data

    def __iter__(self):
        yield from self.data


def test_a_stream_of_examples_is_enough(trainer, examples) -> None:
    run = trainer("bert", train_dataset=Stream(examples("bert", count=64)), max_steps=3)
    run.train()
    assert len(logged(run)) == 3


def test_mixed_precision(trainer) -> None:
    exact, mixed = trainer("bert", max_steps=2), trainer("bert", max_steps=2, bf16=True)
    exact.train()
    mixed.train()
    assert logged(mixed) == pytest.approx(logged(exact), rel=0.2)
    assert logged(mixed) != logged(exact)


def test_sound_has_a_kl_of_logits(arguments) -> None:
    torch.manual_seed(0)
    case = BY_NAME["whisper"]
    model = get_peft_model(case.build(), VariatorConfig(bottleneck_dim=4, init_weights=False))
    sound = {name: values for name, values in case.inputs(4).items() if name == "input_features"}
    labels = torch.tensor([[7, 8, 9, -100]] * 4)
    rows = [{name: values[index] for name, values in {**sound, "labels": labels}.items()} for index in range(4)]
    args = arguments(logits_weight=1.0, hidden_weight=0.0)
    losses = DistillationTrainer(model, args, train_dataset=rows, eval_dataset=rows).evaluate()
    with torch.no_grad():
        logits = model(**sound, labels=labels).logits[:, :3].log_softmax(-1)
    with torch.no_grad(), model.disable_adapter():
        target = model(**sound, labels=labels).logits[:, :3].log_softmax(-1)
    wanted = nn.functional.kl_div(logits, target, log_target=True, reduction="none").sum(-1).mean()
    assert losses["eval_logits_loss"] == pytest.approx(float(wanted), rel=1e-4)
    assert losses["eval_logits_loss"] > 0
    head = get_peft_model(BY_NAME["wav2vec2"].build(), VariatorConfig(bottleneck_dim=4))
    with pytest.raises(ValueError, match=r"logits_weight=1.0, and Wav2Vec2ForCTC has a CTC head"):
        DistillationTrainer(head, args)


def test_wrong_arguments_are_named(trainer, base_model, plugin_model, arguments, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is a TrainingArguments; DistillationTrainer takes a DistillationConfig"):
        DistillationTrainer(plugin_model("bert"), TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="has no trainable adapter"):
        trainer("bert", base_model("bert"))
    with pytest.raises(ValueError, match=r"logits_weight=1.0 needs a model with a known head, and BertModel has none"):
        trainer("bert", logits_weight=1.0)
    with pytest.raises(ValueError, match=r"task_weight=1.0 needs a model that takes labels, and BertModel takes none"):
        trainer("bert", task_weight=1.0)
    with pytest.raises(ValueError, match=r"ratios=\[2, 4\] is for Variator plugins"):
        trainer("bert", random_lora(base_model("bert")), ratios=[2, 4])
    with pytest.raises(ValueError, match="scoring='concat'"):
        trainer("bert", plugin_model("bert", scoring="concat"), ratios=[2, 4])
    two_gpus = arguments()
    two_gpus._n_gpu = 2
    with pytest.raises(ValueError, match="One process sees 2 GPUs.*accelerate launch"):
        DistillationTrainer(plugin_model("bert"), two_gpus)


def test_batches_that_lack_something_are_named(trainer, plugin_model, examples, collate) -> None:
    run = trainer("bert-classifier", task_weight=1.0, train_dataset=examples("bert-classifier", labels=False))
    with pytest.raises(
        ValueError, match=r"task_weight=1.0 needs labels, and the batch has only input_ids, attention_mask"
    ):
        run.train()
    run = trainer("bert")
    with pytest.raises(ValueError, match="The model returned no hidden_states, only last_hidden_state"):
        run.terms["hidden"].states({"last_hidden_state": torch.zeros(1)}, None)
    with pytest.raises(RuntimeError, match="The variance of hidden_states has not been measured"):
        run.terms["hidden"].loss({}, {}, {})
