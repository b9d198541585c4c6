"""Real English text that comes with every Python, the documentation that `help("TOPIC")` shows; and STS-B."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from transformers import PreTrainedTokenizerBase

from peft_variator.training.data import cut_sentences_and_spans, split_sentences, surroundings, tokenize_documents


__all__ = ["Corpus", "ScoredPair", "load_corpus", "make_examples", "read_stsb"]

# A paragraph with fewer words is a heading, a signature or a line of code.
MIN_WORDS = 8
# Each epoch is cut at other places, and each seed cuts its own.
MOST_EPOCHS = 10_000
# Of this many topics in alphabetical order, one is held out.
TOPICS_PER_HELD_OUT = 5


@dataclass(frozen=True)
class Corpus:
    """Paragraphs without line breaks; the two lists have no topic and no paragraph in common.

    Args:
        training: to train on.
        held_out: to measure on.
    """

    training: list[str]
    held_out: list[str]


def load_corpus() -> Corpus:
    """Split Python's documentation by topic.

    Topics quote each other at length. A paragraph is held out if it occurs in a held-out topic, and none occurs twice.
    """
    names = sorted(topics)
    held_out = _paragraphs(names[::TOPICS_PER_HELD_OUT])
    measured = set(held_out)
    return Corpus([paragraph for paragraph in _paragraphs(names) if paragraph not in measured], held_out)


def _paragraphs(names: list[str]) -> list[str]:
    """What stands between blank lines, with single spaces, if it is long enough to be prose."""
    parts = [part.split() for name in names for part in re.split(r"\n\s*\n", topics[name])]
    return list(dict.fromkeys(" ".join(words) for words in parts if len(words) >= MIN_WORDS))


@dataclass(frozen=True)
class ScoredPair:
    """Two texts, and how alike people found them.

    Args:
        left: one of them.
        right: the other.
        score: 0, unrelated, to 5, equal.
    """

    left: str
    right: str
    score: float


def read_stsb(path: Path) -> list[ScoredPair]:
    """The pairs of STS-B (Cer et al. 2017): tab-separated, the score in the fifth column, then the texts.

    Raises:
        OSError: the file can't be read.
        ValueError: a line of it has no score and two texts there.
    """
    pairs = []
    with path.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            try:
                pairs.append(ScoredPair(row[5], row[6], float(row[4])))
            except (IndexError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: no score and two texts in columns 5 to 7.") from error
    if len(pairs) < 2:
        raise ValueError(f"{path} has {len(pairs)} pairs; a correlation needs 2 at least.")
    return pairs


def make_examples(
    paragraphs: list[str], tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, seed: int
) -> list[dict[str, list[int]]]:
    """Sentences and passages of uneven length, cut from the paragraphs over and over, each time at other places.

    Args:
        paragraphs: text to cut from; no passage is of two of them.
        tokenizer: the model's tokenizer.
        count: number of examples.
        max_tokens: most tokens in an example, with its special tokens.
        seed: of the lengths.

    Returns:
        `input_ids` of each example.
    """
    before, after = surroundings(tokenizer)
    room = max_tokens - len(before) - len(after)
    (documents,) = tokenize_documents([map(split_sentences, paragraphs)], tokenizer, limit=count * room)
    examples: list[list[int]] = []
    epoch = 0
    while len(examples) < count:
        examples += cut_sentences_and_spans(documents, room, MOST_EPOCHS * seed + epoch)
        epoch += 1
    return [{"input_ids": [*before, *example, *after]} for example in examples[:count]]
