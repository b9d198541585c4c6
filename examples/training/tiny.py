"""What the examples of this folder share: options, data in files, and models so small that tests can train them."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(60))]


def options(description: str, model: str, data: str) -> argparse.Namespace:
    """The options of an example.

    Args:
        description: what it does.
        model: the model that is taken where none is named.
        data: what `--data` holds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", nargs="?", default=model, help="Hub name or folder")
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--output", type=Path, required=True, help="folder for the plugin")
    parser.add_argument("--ratio", type=int, default=4, help="compression ratio k")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, two steps, no network: a smoke test")
    found = parser.parse_args()
    if found.tiny:
        found.steps, found.batch_size = 2, 4
    elif found.data is None:
        parser.error("--data is missing")
    return found


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Two columns with a tab between them, a pair a line."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [(row[0], row[1]) for row in csv.reader(lines, delimiter="\t")]


def tiny_pairs(count: int = 16) -> list[tuple[str, str]]:
    """A text of random words, and how many of them are beyond the middle of the vocabulary, 0 or 1 by majority."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 60, (count, 12), generator=generator)
    return [(" ".join(f"w{word}" for word in row.tolist()), str(int((row > 30).sum() > 6))) for row in rows]


def save_tiny(kind: str, folder: Path) -> str:
    """Save a tiny model and its tokenizer.

    Args:
        kind: `"encoder"`, `"causal"` or `"seq2seq"`.
        folder: where to.

    Returns:
        str: the folder, as `from_pretrained` takes it.
    """
    torch.manual_seed(0)
    if kind == "encoder":
        model = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), num_labels=2, **SIZES))
    elif kind == "causal":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **SIZES))
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        )
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    single = "[CLS] $A [SEP]" if kind == "encoder" else "$A" if kind == "causal" else "$A [SEP]"
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[SEP]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    ).save_pretrained(folder)
    return str(folder)
