"""A tiny base with its tokenizer in a folder, and a plugin for it beside it, for commands that are given both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from peft_variator import VariatorConfig
from tests.word_tokenizer import BERT_SPECIAL, numbered_words, word_tokenizer


TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
IMAGES = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 4}
T5 = {
    "decoder_start_token_id": 0,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 40,
}


def save_base(folder: Path, kind: str) -> PreTrainedModel:
    """A tiny model and its tokenizer or image processor."""
    torch.manual_seed(0)
    model = {
        "encoder": lambda: BertModel(BertConfig(**TEXT)),
        "classifier": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
        "causal": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
        "seq2seq": lambda: T5ForConditionalGeneration(T5Config(**T5)),
        "vision": lambda: ViTModel(ViTConfig(**IMAGES), add_pooling_layer=False),
    }[kind]()
    model.save_pretrained(folder)
    if kind == "vision":
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        return type(model).from_pretrained(folder, add_pooling_layer=False)
    words = [*BERT_SPECIAL, *numbered_words(36)]
    word_tokenizer(words, "[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]").save_pretrained(
        folder
    )
    return type(model).from_pretrained(folder)


def save_plugin(folder: Path, kind: str = "encoder", **fields: Any) -> Path:
    """A base in `folder/model`, and its plugin, whose path is returned."""
    base = save_base(folder / "model", kind)
    torch.manual_seed(1)
    get_peft_model(base, VariatorConfig(init_weights=False, keep_token_ids=[2, 3], **fields)).save_pretrained(
        folder / "plugin"
    )
    return folder / "plugin"
