"""`peft-variator export` as it is typed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM

from peft_variator import VariatorConfig
from tests.cli.commands import run_command
from tests.cli.saved_plugins import save_plugin
from tests.tiny_models import BY_NAME, tiny_model
from tests.word_tokenizer import BERT_SPECIAL, numbered_words, word_tokenizer


invoke = partial(run_command, "export")


def test_a_file_that_runs_without_torch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    plugin, output = save_plugin(tmp_path, layers=1), tmp_path / "out" / "model.onnx"
    status, out, err = invoke(plugin, "--output", output, "--ratio", 2, "--json", tmp_path / "report.json")
    assert status == 0, err
    assert str(output) in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ratio"] == 2
    assert report["max_difference"] < 1e-4
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert told["peft_variator.compression_ratio"] == "2"
    assert told["peft_variator.adapter"] == str(plugin)
    assert told["peft_variator.max_kept_tokens"] == "4"
    # What lies beside the file is all that is needed.
    texts = AutoTokenizer.from_pretrained(output.parent)(["w3 w4 w5 w6 w7", "w9"], padding=True, return_tensors="np")
    states = session.run(["last_hidden_state"], dict(texts))[0]
    assert states.shape == (2, 7, 16)
    assert {path.name for path in output.parent.iterdir()} == {"model.onnx", "tokenizer.json", "tokenizer_config.json"}
    # Another model's file needs another tokenizer.
    other = save_plugin(tmp_path / "other", layers=1)
    words = word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w0"], "[CLS] $A [SEP]", cls_token="[CLS]")
    words.save_pretrained(tmp_path / "other" / "model")
    before = (output.parent / "tokenizer.json").read_bytes()
    status, _, err = invoke(other, "--output", output.with_name("other.onnx"))
    assert status == 1
    assert "model.onnx" in err
    assert (output.parent / "tokenizer.json").read_bytes() == before


def test_a_classifier_of_pairs_is_told_which_text_a_token_is_of(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    tiny_model("bert-sequence", **sizes, vocab_size=40, initializer_range=0.5).save_pretrained(tmp_path / "model")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    words, pair = [*BERT_SPECIAL, *numbered_words(36)], "[CLS] $A [SEP] $B:1 [SEP]:1"
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = word_tokenizer(words, "[CLS] $A [SEP]", pair, **special, model_input_names=names)
    tokenizer.save_pretrained(tmp_path / "model")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    config = VariatorConfig.from_tokenizer(tokenizer, compression_ratio=2, init_weights=False, task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(tmp_path / "plugin")
    output = tmp_path / "out" / "model.onnx"
    status, out, err = invoke(tmp_path / "plugin", "--output", output)
    assert status == 0, err
    assert "Inputs input_ids, attention_mask, token_type_ids" in out
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    inputs = tokenizer(
        ["w1 w2 w3 w4 w5", "w1 w2"], ["w7 w8 w9", "w9 w3 w2 w1 w4 w4"], padding=True, return_tensors="pt"
    )
    base = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "plugin").eval()
    with torch.no_grad():
        wanted, one_text = model(**inputs).logits, model(**inputs | {"token_type_ids": None}).logits
    (found,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - one_text).abs().max() > 0.01


MORE = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("t5-encoder", "bert-generation", "esm", "dpt", "mpnet", "vit", "roberta")
]


def save_case(folder: Path, name: str, **fields: Any) -> Path:
    """Save a tiny model, and a plugin for it, whose folder is returned."""
    case = BY_NAME[name]
    case.build().save_pretrained(folder / "model")
    base = type(case.build()).from_pretrained(folder / "model")
    get_peft_model(base, VariatorConfig(init_weights=False, **fields)).save_pretrained(folder / "plugin")
    return folder / "plugin"


@pytest.mark.parametrize("name", ["clip-text", *MORE])
def test_encoders_whose_architecture_does_not_tell_how_they_are_used(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    status, _, err = invoke(save_case(tmp_path, name), "-o", tmp_path / "model.onnx")
    assert status == 0, err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("siglip2-vision", "it takes pixel_attention_mask, pixel_values, spatial_shapes"),
        ("videomae", "it takes pixel_values"),
        ("whisper", "which generates"),
    ],
)
def test_models_of_other_inputs_are_refused_in_words(tmp_path: Path, name: str, said: str) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    status, _, err = invoke(save_case(tmp_path, name), "-o", tmp_path / "model.onnx")
    assert status == 1
    assert said in err
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_a_text_that_keeps_too_much_is_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    plugin = save_case(tmp_path, "bert", max_kept_tokens=0)
    status, _, err = invoke(plugin, "-o", tmp_path / "model.onnx")
    assert status == 1
    assert "raise max_kept_tokens" in err


def test_what_can_t_be_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    plugin, output = save_plugin(tmp_path, "causal"), tmp_path / "out" / "model.onnx"
    lora = LoraConfig(target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "model"), lora).save_pretrained(tmp_path / "lora")
    for words, said in (
        ((plugin, "-o", output), "LlamaForCausalLM, which generates"),
        ((plugin, "-o", tmp_path / "model.bin"), ".onnx"),
        ((plugin, "-o", output, "--ratio", "0"), "--ratio is 0"),
        ((tmp_path / "lora", "-o", output), "LORA"),
        ((tmp_path / "nothing", "-o", output), "nothing"),
    ):
        status, _, err = invoke(*words)
        assert status == 1, words
        assert said in err
    assert not output.exists()
