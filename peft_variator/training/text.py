"""Plain text as training examples: spans of tokens of uneven length, and what a model is to do with them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


__all__ = ["cut_spans", "read_texts", "split_spans", "surroundings", "tokenize"]

LINES_AT_ONCE = 512
# Where a span is cut into what is read and what is predicted, as a fraction of it: mostly prompt, as that is where a
# plugin works.
PROMPT_SHARE = (0.5, 0.9)


def read_texts(data: str, *, column: str = "text", split: str = "train") -> Iterator[str]:
    """The lines of a text file, or a column of a `.jsonl` file or of a data set.

    Args:
        data: path of a file, or what `datasets.load_dataset` takes.
        column: which column holds the text.
        split: which split of the data set is read.

    Raises:
        FileNotFoundError: `data` looks like a file and there is none.
        ImportError: `data` is no file and `datasets` is not installed.
        ValueError: there is no such column, or `datasets` can't read it.
    """
    path = Path(data)
    if path.is_file():
        return _column(_records(path), column, data) if path.suffix == ".jsonl" else _lines(path)
    if path.suffix in (".txt", ".jsonl", ".md", ".csv", ".json") or data.startswith((".", "/", "~")):
        if not path.is_dir():
            raise FileNotFoundError(f"There is no file {data!r}. Name a text file, or a data set on the Hub.")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(
            f"{data!r} is no local file, and reading it as a data set needs `datasets`: pip install datasets. Or name "
            "a text file."
        ) from error
    try:
        records = load_dataset(data, split=split)
    except DatasetsError as error:
        raise ValueError(f"`datasets` can't read {data!r}: {error.__cause__ or error}") from error
    return _column(records, column, data)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}. Save it as UTF-8.") from error


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}. Every line has to be an object.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} holds a {type(record).__name__}. Every line has to be an object.")
        yield record


def _column(records: Iterable[dict[str, Any]], column: str, data: str) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        if column not in record:
            raise ValueError(f"{data} has no column {column!r}, only {', '.join(record)}. Name the one with the text.")
        if not isinstance(record[column], str):
            kind = type(record[column]).__name__
            raise ValueError(f"{data}, row {number}: column {column!r} holds a {kind}, but it has to be a text.")
        yield record[column]


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Token ids of the texts one after the other, without special tokens.

    Args:
        texts: lines or documents; no more of them is read than is needed.
        tokenizer: the model's tokenizer.
        limit: about how many tokens are wanted.
    """
    tokens: list[int] = []
    remaining = (text for text in texts if text.strip())
    while len(tokens) < limit and (batch := list(islice(remaining, LINES_AT_ONCE))):
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            tokens += ids
    return tokens[:limit]


def surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def cut_spans(tokens: list[int], longest: int, seed: int) -> list[list[int]]:
    """Cut a stream of tokens into spans of uneven length, drawn evenly from a quarter of `longest` to all of it.

    A plugin trained on one length only would not have seen groups that end early, nor padding.

    Args:
        tokens: the stream.
        longest: most tokens in a span, 4 or more.
        seed: seed of the lengths.

    Raises:
        ValueError: `longest` is below 4.
    """
    if longest < 4:
        raise ValueError(
            f"A span of {longest} tokens is too short to merge anything in. Choose a length of 4 or more."
        )
    generator, spans, start = random.Random(f"lengths of spans, seed {seed}"), [], 0
    while start < len(tokens):
        end = start + generator.randint(longest // 4, longest)
        spans.append(tokens[start:end])
        start = end
    if len(spans) > 1 and len(spans[-1]) < longest // 4:
        spans.pop()
    return spans


def split_spans(
    spans: Iterable[list[int]], before: list[int], after: list[int], *, is_decoder: bool, seed: int
) -> list[dict[str, list[int]]]:
    """Examples in which a model reads the first part of a span and predicts the rest.

    Args:
        spans: spans of tokens, each of 2 or more.
        before: special tokens that start a text.
        after: special tokens that end a text.
        is_decoder: whether the rest is the target of a decoder (an encoder–decoder model), rather than the rest of
            the same sequence, whose prompt has labels of −100.
        seed: seed of where spans are split.
    """
    generator = random.Random(f"ends of prompts, seed {seed}")
    examples = []
    for span in spans:
        place = min(max(1, round(len(span) * generator.uniform(*PROMPT_SHARE))), len(span) - 1)
        prompt, rest = span[:place], span[place:]
        if is_decoder:
            examples.append({"input_ids": [*before, *prompt, *after], "labels": [*rest, *after]})
        else:
            labels = [-100] * (len(before) + place) + rest
            examples.append({"input_ids": [*before, *span], "labels": labels})
    return examples
