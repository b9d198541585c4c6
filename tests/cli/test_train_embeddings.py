"""`peft-variator train` on a model of sentence-transformers: the plugin's folder loads by itself, pooling included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_train import QUICK, SMALL, invoke, save_data, save_model
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from peft_variator import load_plugin
from peft_variator.sentence_folder import sentence_files


sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11", "w3 w20 w21 w22 w23 w24 w25 w26 w1 w2"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny encoder with pooling of the first token and normalisation, as sentence-transformers saves it."""
    from sentence_transformers.models import Normalize, Pooling, Transformer

    save_model(tmp_path / "plain", "encoder")
    transformer = Transformer(str(tmp_path / "plain"))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    sentence_transformers.SentenceTransformer(modules=[transformer, pooling, Normalize()]).save(
        str(tmp_path / "model")
    )
    return tmp_path / "model"


def test_the_plugin_s_folder_loads_by_itself(base: Path, tmp_path: Path) -> None:
    data, output = save_data(tmp_path / "data", "encoder"), tmp_path / "plugin"
    status, out, err = invoke(base, "--data", data, "--output", output, "--ratio", 4, "--lr", 0.1, *QUICK, *SMALL)
    assert status == 0, err
    assert f"SentenceTransformer('{output}')" in out
    model = sentence_transformers.SentenceTransformer(str(output), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    plugin = PeftModel.from_pretrained(BertModel.from_pretrained(base), output).eval()
    inputs = PreTrainedTokenizerFast.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        first = plugin(**inputs).last_hidden_state[:, 0]
    found = model.encode(TEXTS)
    np.testing.assert_allclose(found, torch.nn.functional.normalize(first, dim=-1).numpy(), atol=1e-5)
    alone = sentence_transformers.SentenceTransformer(str(base), device="cpu").encode(TEXTS)
    assert np.abs(found - alone).max() > 1e-3


def test_a_cross_encoder_s_plugin_loads_under_its_head(base: Path, tmp_path: Path) -> None:
    """It is trained on the encoder alone, and is really on below the head."""
    torch.manual_seed(0)
    config = BertModel.from_pretrained(base).config
    config.update({"num_labels": 1, "initializer_range": 0.5})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "head")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "head")
    ranker = sentence_transformers.CrossEncoder(str(tmp_path / "head"), device="cpu")
    ranker.save(str(tmp_path / "ranker"))
    data, output = save_data(tmp_path / "data", "encoder"), tmp_path / "plugin"
    options = ["--output", output, "--ratio", 4, "--lr", 0.1, *QUICK, *SMALL]
    status, out, err = invoke(tmp_path / "ranker", "--data", data, *options)
    assert status == 0, err
    assert f"CrossEncoder('{output}')" in out
    plugin = load_plugin(BertForSequenceClassification.from_pretrained(tmp_path / "head"), output, is_trainable=False)
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[1])]
    inputs = ranker.tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = plugin.eval()(**inputs).logits.sigmoid().squeeze(-1)
    found = sentence_transformers.CrossEncoder(str(output), device="cpu").predict(pairs)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
    assert np.abs(found - ranker.predict(pairs)).max() > 1e-3


@pytest.mark.parametrize("content", ['[{"path": "../../secrets"}]', '[{"path": "/etc"}]', '{"a": 1}', "no JSON"])
def test_a_list_of_modules_that_names_other_folders_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json"):
        sentence_files(str(tmp_path))


def test_files_of_modules_are_found_and_others_stay(tmp_path: Path) -> None:
    assert sentence_files(str(tmp_path)) == {}
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize"}]))
    (tmp_path / "1_Pooling").mkdir()
    for name in ("1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json", "x.bin"):
        (tmp_path / name).write_text("{}")
    assert set(sentence_files(str(tmp_path))) == {
        "modules.json",
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    }
