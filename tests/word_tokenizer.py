"""The one tokenizer of all tests: whole words, made without files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
BERT_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def word_tokenizer(
    words: Sequence[str], template: str = "$A", pair: str | None = None, *, unknown: str | None = None, **fields: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are places in a list of words.

    Args:
        words: the vocabulary.
        template: what a text becomes: `"[CLS] $A [SEP]"`.
        pair: what two texts become.
        unknown: the word that stands for others; `None`: the second.
        fields: special tokens and others that the tokenizer knows of itself.
    """
    ids = {word: index for index, word in enumerate(words)}
    made = Tokenizer(WordLevel(ids, unk_token=unknown or words[1]))
    made.pre_tokenizer = Whitespace()
    special = [(word, ids[word]) for word in f"{template} {pair or ''}".replace(":1", "").split() if word in ids]
    if special:
        made.post_processor = TemplateProcessing(template, pair, special)
    return PreTrainedTokenizerFast(tokenizer_object=made, **fields)


def numbered_words(count: int) -> list[str]:
    """`w0`, `w1` and so on."""
    return [f"w{index}" for index in range(count)]
