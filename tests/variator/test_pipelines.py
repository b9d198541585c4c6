"""transformers' pipelines and PEFT's automatic classes run a plugin from its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, BertTokenizerFast, pipeline

from peft_variator import VariatorConfig


TEXT = "a b c d e f g h i j k l m n"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plugin with random weights on a tiny encoder, with the tokenizer beside both."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(ord("a"), ord("z") + 1))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "base")
    base = BertModel.from_pretrained(tmp_path / "base")
    config = VariatorConfig(init_weights=False, compression_ratio=8, task_type="FEATURE_EXTRACTION")
    get_peft_model(base, config).save_pretrained(tmp_path / "plugin")
    for folder in ("base", "plugin"):
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / folder)
    return tmp_path / "plugin"


@pytest.fixture
def expected(adapter: Path) -> np.ndarray:
    model = PeftModel.from_pretrained(BertModel.from_pretrained(adapter.parent / "base"), adapter).eval()
    inputs = BertTokenizerFast.from_pretrained(adapter)(TEXT, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
        model.set_compression_ratio(1)
        assert (found - model(**inputs).last_hidden_state).abs().max() > 1e-3
    return found.numpy()


def test_a_pipeline_takes_the_plugin_s_folder(adapter: Path, expected: np.ndarray) -> None:
    extract = pipeline("feature-extraction", model=str(adapter), device="cpu")
    np.testing.assert_allclose(np.array(extract(TEXT)), expected, atol=1e-5)


def test_a_pipeline_takes_a_peft_model(adapter: Path, expected: np.ndarray) -> None:
    model = AutoPeftModelForFeatureExtraction.from_pretrained(str(adapter))
    extract = pipeline(
        "feature-extraction", model=model, tokenizer=BertTokenizerFast.from_pretrained(adapter), device="cpu"
    )
    np.testing.assert_allclose(np.array(extract(TEXT)), expected, atol=1e-5)
