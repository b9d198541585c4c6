"""Tiny 2:4 models from configs, and folders of them on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

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


def tiny_llama(tie: bool = False, width: int = 32, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=44,  # rows of down_proj that do not end on a byte
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        **kwargs,
    )
    return make_two_four(LlamaForCausalLM(config))


def tiny_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return make_two_four(BertForSequenceClassification(config), leave=("classifier",))


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return make_two_four(T5ForConditionalGeneration(config))


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
