"""The card that is written whenever an adapter is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.adapter_card import CardContent, make_card, measured, set_license, write_card
from tests.tiny_models import tiny_model


def bert() -> PreTrainedModel:
    return tiny_model("bert", num_hidden_layers=1)


def llama() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


CONFIGS: dict[str, Any] = {
    "variator": lambda: VariatorConfig(compression_ratio=4, trained_ratios=[2, 4, 8]),
    "sparse-lora": lambda: SparseLoraConfig(r=2, target_modules=["query", "q_proj"]),
}


def save(folder: Path, config: Any, base: str = "", model: torch.nn.Module | None = None) -> PeftModel:
    model = model or bert()
    model.name_or_path = base
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize("method", CONFIGS)
def test_what_peft_saves_has_a_card(method: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[method](), base="someone/some-bert")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/some-bert"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "feature-extraction")
    assert {"peft-variator", method} <= set(card.data.tags)
    assert "More Information Needed" not in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert "import peft_variator" in code.splitlines()[0]
    assert "BertModel.from_pretrained('someone/some-bert')" in code
    compile(code, "card", "exec")


def test_a_plugin_s_card_tells_its_ratios(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["variator"]())
    text = ModelCard.load(tmp_path / "README.md").text
    assert "2, 4, 8" in text
    assert "set_compression_ratio(8)" in text


@pytest.mark.parametrize("base", ["", "/models/bert", "./bert", "a/b/c", "FOLDER"])
def test_a_path_is_no_base_for_the_hub(base: str, tmp_path: Path) -> None:
    base = str(tmp_path) if base == "FOLDER" else base
    save(tmp_path / "adapter", VariatorConfig(), base=base)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model is None
    assert not any("/" in tag for tag in card.data.tags)
    assert str(tmp_path) not in str(card)


def test_transformers_saves_a_card_too(tmp_path: Path) -> None:
    save(tmp_path / "plugin", CONFIGS["variator"](), base="someone/some-bert")
    model = bert()
    model.load_adapter(str(tmp_path / "plugin"))
    model.save_pretrained(tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("someone/some-bert", "peft")
    assert "2, 4, 8" in card.text


def test_checkpoints_of_a_trainer_have_a_card(tmp_path: Path) -> None:
    model = llama()
    model.name_or_path = "someone/some-llama"
    data = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}] * 2
    args = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(get_peft_model(model, VariatorConfig(task_type="CAUSAL_LM")), args, train_dataset=data).train()
    card = ModelCard.load(tmp_path / "checkpoint-1" / "README.md")
    assert (card.data.base_model, card.data.pipeline_tag) == ("someone/some-llama", "text-generation")
    assert "peft-variator" in card.data.tags


MINE = """---
license: mit
language: en
datasets:
- someone/texts
---

# My plugin

Made on a Sunday.
"""


def test_a_readme_keeps_its_text_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(MINE)
    model = save(tmp_path, VariatorConfig(compression_ratio=2), base="someone/some-bert")
    first = (tmp_path / "README.md").read_text()
    card = ModelCard(first)
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["someone/texts"])
    assert card.data.base_model == "someone/some-bert"
    assert "# My plugin\n\nMade on a Sunday.\n" in card.text
    assert "ratio k: 2" in card.text

    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == first

    (tmp_path / "README.md").write_text(first + "\nWritten below.\n")
    model.peft_config["default"].compression_ratio = 8
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "ratio k: 8" in text
    assert "ratio k: 2" not in text
    assert text.index("Made on a Sunday.") < text.index("ratio k: 8") < text.index("Written below.")


@pytest.mark.parametrize(
    "readme",
    ["<!-- peft-variator -->\nno end", "<!-- /peft-variator -->\n<!-- peft-variator -->", "---\na: [\n---\ntext"],
)
def test_a_readme_that_can_not_be_renewed_is_left_with_a_warning(readme: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    with pytest.warns(UserWarning, match=r"README\.md"):
        write_card(tmp_path, CardContent("body", None, []))
    assert (tmp_path / "README.md").read_text() == readme


def test_results_are_replaced_and_those_of_others_stay() -> None:
    theirs = MINE.replace(
        "license: mit\n",
        "license: mit\nmodel-index:\n- name: mine\n  results:\n  - task:\n      type: sts\n    dataset:\n"
        "      type: stsb\n      name: STS-B\n    metrics:\n    - type: spearmanr\n      value: 80\n",
    )
    first = make_card(CardContent("one", None, [], results=[measured("cosine", 0.5, 4)]), theirs)
    second = make_card(CardContent("two", None, [], results=[measured("cosine", 0.75, 4)]), str(first))
    values = {result.metric_type: result.metric_value for result in second.data.eval_results}
    assert values == {"spearmanr": 80, "cosine": 0.75}
    third = make_card(CardContent("three", None, []), str(second))
    assert [result.metric_type for result in third.data.eval_results] == ["spearmanr"]


def test_a_license_is_set_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, VariatorConfig(), base="someone/some-bert")
    before = ModelCard.load(tmp_path / "README.md")
    set_license(tmp_path, "apache-2.0")
    after = ModelCard.load(tmp_path / "README.md")
    assert after.data.to_dict() == {**before.data.to_dict(), "license": "apache-2.0"}
    assert after.text == before.text
