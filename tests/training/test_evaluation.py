"""Fidelity on held-out data."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest
import torch
from peft import PeftModel, get_peft_model
from training_cases import build_base, build_plugin, collate_batch, make_examples

from peft_variator import DistillationConfig, DistillationTrainer, VariatorConfig
from peft_variator.metrics import path
from peft_variator.training.evaluation import measure_quality, measure_ratios
from tests.tiny_models import IN_READING_ORDER, tiny_model


@pytest.fixture
def batches():
    """Makes the batches of a model's examples."""

    def make(name: str, size: int):
        examples = make_examples(name, count=6)
        return [collate_batch(examples[start : start + size]) for start in range(0, 6, size)]

    return make


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_an_exact_plugin_is_perfect_and_another_is_not(batches, name: str) -> None:
    model = build_plugin(name, init_weights=False)
    worse = measure_quality(model, batches(name, 4))
    model.set_compression_ratio(1)
    perfect = measure_quality(model, batches(name, 4))
    assert set(perfect) == set(worse)
    for measure, value in perfect.items():
        assert value == pytest.approx(0 if "error" in measure else 1, abs=1e-6)
        assert worse[measure] != pytest.approx(value, abs=1e-4) or measure == "agreement"


def test_a_base_that_is_not_finite_is_told(batches) -> None:
    model = build_plugin("bert")
    with torch.no_grad():
        next(iter(model.get_base_model().parameters()))[:] = torch.nan
    with pytest.raises(ValueError, match="The base model gives values that are not finite"):
        measure_ratios(model, batches("bert", 3), [4])


def test_padded_patches_count_in_nothing(tmp_path: Path) -> None:
    case = next(case for case in IN_READING_ORDER if case.name == "siglip2-vision")
    model = get_peft_model(case.build(), VariatorConfig(bottleneck_dim=4, init_weights=False))
    weights = {"embedding_weight": 1.0, "embedding_pooling": "mean", "variance_samples": 3}
    args = DistillationConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, **weights)
    images = torch.randn(3, 16, 48)
    found = []
    for padding in (0, 20):
        patches = torch.cat([images, torch.randn(3, padding, 48)], dim=1)
        mask = torch.arange(16 + padding).lt(16).long().expand(3, -1)
        shapes = torch.tensor([4, 4]).expand(3, -1)
        batch = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        rows = [{name: values[index] for name, values in batch.items()} for index in range(3)]
        trainer = DistillationTrainer(model, args, train_dataset=rows, eval_dataset=rows)
        losses = {name: value for name, value in trainer.evaluate().items() if name.endswith("loss")}
        found.append(losses | measure_quality(model, [batch]) | measure_ratios(model, [batch], [2])[2])
    assert {"eval_hidden_loss", "eval_embedding_loss", "cosine", "embedding_cosine"} <= found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_the_measures_are_those_of_the_metric(batches) -> None:
    model = build_plugin("bert", init_weights=False).eval()
    metric = evaluate.load(path("fidelity"), "hidden")
    (batch,) = batches("bert", 6)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        mine = model(**batch).last_hidden_state[real]
        with model.disable_adapter():
            base = model(**batch).last_hidden_state[real]
    wanted = metric.compute(predictions=mine.numpy(), references=base.numpy())
    assert measure_quality(model, batches("bert", 6)) == pytest.approx(wanted, rel=1e-5)
    assert measure_quality(model, batches("bert", 1)) == pytest.approx(wanted, rel=1e-5)


def test_an_adapter_need_not_be_trainable(batches, tmp_path) -> None:
    model = build_plugin("bert", init_weights=False)
    wanted = measure_quality(model, batches("bert", 4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_base("bert"), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert measure_quality(loaded, batches("bert", 4)) == pytest.approx(wanted, rel=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    added = build_base("bert")
    added.load_adapter(tmp_path)
    assert measure_quality(added, batches("bert", 4)) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="no active adapter"):
        measure_quality(build_base("bert"), batches("bert", 4))


def test_names_of_the_measures(batches) -> None:
    assert set(measure_quality(build_plugin("bert"), batches("bert", 6))) == {"cosine", "relative_error"}
    assert set(measure_quality(build_plugin("llama"), batches("llama", 6))) == {
        "cosine",
        "relative_error",
        "agreement",
    }
    assert set(measure_quality(build_plugin("t5"), batches("t5", 6))) == {
        "encoder_cosine",
        "encoder_relative_error",
        "decoder_cosine",
        "decoder_relative_error",
        "agreement",
    }


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("single_label_classification", 3), ("multi_label_classification", 3), ("regression", 3), (None, 1)],
)
def test_what_a_head_s_numbers_are_decides_how_they_agree(problem: str | None, labels: int) -> None:
    """Against the plainest count; of one number, a reranker's, the largest entry would always be the same."""
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    base = tiny_model("bert-sequence", **fields, num_labels=labels, problem_type=problem, initializer_range=0.5)
    config = VariatorConfig(task_type="SEQ_CLS", compression_ratio=4, init_weights=False)
    model = get_peft_model(base, config).eval()
    batches = [{"input_ids": torch.randint(5, 90, (4, 12))} for _ in range(3)]
    if labels == 1:  # a number's label has no likelihood
        labelled = [{**batch, "labels": torch.rand(4, 1)} for batch in batches]
        assert "nll" not in measure_ratios(model, labelled, [4])[4]
    with torch.no_grad():
        mine = torch.cat([model(**batch).logits for batch in batches])
        with model.disable_adapter():
            wanted = torch.cat([model(**batch).logits for batch in batches])
    if labels == 1 or problem == "regression":
        name, expected = "score_error", float((mine - wanted).abs().mean())
    elif problem == "multi_label_classification":
        name, expected = "agreement", float((mine.sigmoid().round() == wanted.sigmoid().round()).float().mean())
    else:
        name, expected = "agreement", float((mine.argmax(1) == wanted.argmax(1)).float().mean())
    found, by_ratio = measure_quality(model, batches), measure_ratios(model, batches, [4])
    assert found[name] == pytest.approx(expected, abs=1e-5)
    assert by_ratio[4][name] == pytest.approx(expected, abs=1e-5)
    assert by_ratio[1][name] == (0 if name == "score_error" else 1)
    assert not {"agreement", "score_error"} - {name} & set(found)
