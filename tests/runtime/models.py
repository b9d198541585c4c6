"""Tiny models with plugins, a tokenizer without files, and a table that nobody had to measure."""

from __future__ import annotations

import string
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast

from peft_variator import VariatorConfig
from peft_variator.runtime import LatencyTable
from tests.tiny_models import tiny_model
from tests.word_tokenizer import BERT_SPECIAL, BERT_TOKENS, word_tokenizer


WORDS = [*BERT_SPECIAL, *string.ascii_lowercase]
TEXT = {"vocab_size": len(WORDS), "max_position_embeddings": 64}
SENTENCES = ["a b c d e f g h i j k l", "m n o p q", "r s t u v w x y z a b c d e f", "a"]


def tokenizer(*, special: bool = True) -> PreTrainedTokenizerFast:
    """One token a letter; `special` puts [CLS] and [SEP] around them."""
    templates = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if special else ()
    return word_tokenizer(WORDS, *templates, **BERT_TOKENS)


def plugin(base: Any, ratio: int = 4) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, VariatorConfig(init_weights=False, compression_ratio=ratio)).eval()


def encoder() -> PeftModel:
    torch.manual_seed(0)
    return plugin(tiny_model("bert", **TEXT))


def classifier(labels: int = 3) -> PeftModel:
    torch.manual_seed(0)
    return plugin(tiny_model("bert-sequence", **TEXT, num_labels=labels))


def causal() -> PeftModel:
    torch.manual_seed(0)
    return plugin(tiny_model("llama", **TEXT))


def made_table(
    ratios: tuple[int, ...] = (1, 2, 4, 8),
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64),
    lengths: tuple[int, ...] = (8, 64, 256),
    quality: dict[int, float] | None = None,
    scale: float = 1.0,
) -> LatencyTable:
    """A millisecond a call, and 10 µs a token at k = 1, of which half goes with k; times `scale`."""
    seconds = {
        k: tuple(
            tuple(scale * (1e-3 + 1e-5 * batch * length * (0.5 + 0.5 / k)) for length in lengths)
            for batch in batch_sizes
        )
        for k in ratios
    }
    return LatencyTable(ratios, batch_sizes, lengths, seconds, quality)
