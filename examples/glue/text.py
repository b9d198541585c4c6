"""Plain text for the first stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


__all__ = ["plain_text"]


def plain_text(files: list[Path], tokenizer: PreTrainedTokenizerBase, max_length: int = 96) -> list[dict[str, Any]]:
    """Texts of one to four sentences from plain text files, tokenised.

    Args:
        files: text files in UTF-8.
        tokenizer: tokenizer of the base.
        max_length: number of tokens at most.
    """
    sentences = [
        sentence.strip()
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        for sentence in re.split(r"(?<=[.!?])\s+", line)
        if len(sentence.split()) > 3
    ]
    texts, start = [], 0
    while start < len(sentences):
        count = 1 + len(texts) % 4
        texts.append(" ".join(sentences[start : start + count]))
        start += count
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    return [{name: column[row] for name, column in encoded.items()} for row in range(len(texts))]
