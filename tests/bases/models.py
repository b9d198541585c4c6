"""Tiny 2:4 models from configs, and folders of them on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel, T5ForConditionalGeneration

from tests.tiny_models import built_once, tiny_model

from .reference import prune_two_four


# A device map of `tiny_llama` with one block and the head on disk.
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def make_two_four(model: PreTrainedModel, leave: tuple[str, ...] = ("lm_head",)) -> PreTrainedModel:
    """Prune the linear layers of a model in place, except those named, and the tied ones."""
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in leave:
            module.weight.data = prune_two_four(module.weight.data, seed)
    return model.eval()


@built_once
def tiny_llama(tie: bool = False, width: int = 32, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": width, "head_dim": width // 4}
    # rows of down_proj that do not end on a byte
    sizes |= {"intermediate_size": 44, "tie_word_embeddings": tie, "pad_token_id": None}
    return make_two_four(tiny_model("llama", **sizes | fields))


@built_once
def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return make_two_four(tiny_model("bert-sequence", vocab_size=64, num_labels=3), leave=("classifier",))


@built_once
def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return make_two_four(tiny_model("t5", vocab_size=64))


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Outputs for fixed token ids."""
    ids = torch.arange(1, 13).reshape(2, 6)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output = model(input_ids=ids, **inputs)
    return output.logits if "logits" in output else output[0]


def contents(folder: Path) -> dict[str, str]:
    """Name -> digest of every file, to see that none changes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
