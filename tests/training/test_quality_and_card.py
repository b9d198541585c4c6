"""Fidelity on held-out data, and the model card."""

from __future__ import annotations

import evaluate
import pytest
import torch
from huggingface_hub import ModelCard
from training_cases import build_plugin, collate_batch, make_examples

from peft_variator.metrics import path
from peft_variator.training.model_card import PluginFacts, RatioFacts, plugin_card
from peft_variator.training.quality import measure_quality


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


def facts(*ratios: int, measures: tuple[str, ...] = ("cosine",)) -> PluginFacts:
    before, after = dict.fromkeys(measures, 0.5), dict.fromkeys(measures, 0.875)
    return PluginFacts(
        base="some/model",
        model_class="BertModel",
        name="my plugin",
        data="text.txt",
        steps=7,
        held_out=3,
        parameters=1234,
        command="peft-variator train some/model --data text.txt",
        ratios=[RatioFacts(ratio, 1000, 1000 // ratio, before, after) for ratio in ratios],
    )


def test_a_card_says_what_is_needed() -> None:
    card = plugin_card(facts(2, 4))
    assert card.data.to_dict()["base_model"] == "some/model"
    assert card.data.library_name == "peft"
    text = " ".join(card.text.split())
    for words in (
        "`import peft_variator` comes first",
        "| k | FLOPs saved | cosine, before → after |",
        "| 2 | 50.0% | 0.5000 → 0.8750 |",
        "| 4 | 75.0% | 0.5000 → 0.8750 |",
        "Parameters added: 1,234",
        "from transformers import BertModel",
        "PeftModel.from_pretrained(model, 'my plugin')",
        "model.set_compression_ratio(4)",
        "peft-variator train some/model --data text.txt",
        "peft 0.",
    ):
        assert words in text, words
    assert "predictions that agree" not in text


def test_a_card_of_one_ratio_switches_nothing_and_is_read_back(tmp_path) -> None:
    card = plugin_card(facts(4, measures=("cosine", "agreement")))
    assert "set_compression_ratio" not in card.text
    assert "share of predictions that agree" in card.text
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.tags == card.data.tags
