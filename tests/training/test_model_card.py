"""The model card of a plugin."""

from __future__ import annotations

from huggingface_hub import ModelCard

from peft_variator.training.model_card import PluginFacts, RatioFacts, plugin_card


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
