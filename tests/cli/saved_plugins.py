"""A tiny base with its tokenizer in a folder, and a plugin for it beside it, for commands that are given both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, ViTConfig, ViTImageProcessor, ViTModel

from peft_variator import VariatorConfig
from tests.tiny_models import tiny_model
from tests.word_tokenizer import BERT_SPECIAL, numbered_words, word_tokenizer


WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 40, "max_position_embeddings": 512}
T5 = {"d_model": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 40}


def save_base(folder: Path, kind: str, layers: int = 2) -> PreTrainedModel:
    """A tiny model and its tokenizer or image processor."""
    torch.manual_seed(0)
    text = WIDTHS | WORDS | {"num_hidden_layers": layers}
    images = WIDTHS | {"num_hidden_layers": layers, "image_size": 16, "patch_size": 4}
    model = {
        "encoder": lambda: tiny_model("bert", **text),
        "classifier": lambda: tiny_model("bert-sequence", **text),
        "causal": lambda: tiny_model("llama", **text),
        "seq2seq": lambda: tiny_model("t5", **T5, num_layers=layers),
        "vision": lambda: ViTModel(ViTConfig(**images), add_pooling_layer=False),
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


def save_plugin(folder: Path, kind: str = "encoder", layers: int = 2, **fields: Any) -> Path:
    """A base in `folder/model`, and its plugin, whose path is returned."""
    base = save_base(folder / "model", kind, layers)
    torch.manual_seed(1)
    get_peft_model(base, VariatorConfig(init_weights=False, keep_token_ids=[2, 3], **fields)).save_pretrained(
        folder / "plugin"
    )
    return folder / "plugin"
