"""Real English text that comes with every Python: the documentation that `help("TOPIC")` shows."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pydoc_data.topics import topics


__all__ = ["Corpus", "draw_spans", "load_corpus"]

# A paragraph with fewer words is a heading, a signature or a line of code.
MIN_WORDS = 8
# Of this many topics in alphabetical order, one is held out.
TOPICS_PER_HELD_OUT = 5


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text to measure on, which have no topic and no paragraph in common.

    Args:
        training: one string a topic, without line breaks.
        held_out: one string a paragraph, without line breaks.
    """

    training: list[str]
    held_out: list[str]


def load_corpus() -> Corpus:
    """Split Python's documentation by topic.

    Topics quote each other at length. A paragraph belongs to a held-out topic if it occurs in one, else to the first
    topic that has it, so that no paragraph is trained on twice or both trained on and measured on.
    """
    names = sorted(topics)
    held_out_names = names[::TOPICS_PER_HELD_OUT]
    held_out = list(dict.fromkeys(paragraph for name in held_out_names for paragraph in _paragraphs(topics[name])))
    seen = set(held_out)
    training = []
    for name in names:
        fresh = [paragraph for paragraph in _paragraphs(topics[name]) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            training.append(" ".join(fresh))
    return Corpus(training, held_out)


def _paragraphs(text: str) -> list[str]:
    """What stands between blank lines, with single spaces, if it is long enough to be prose."""
    paragraphs = [part.split() for part in re.split(r"\n\s*\n", text)]
    return [" ".join(words) for words in paragraphs if len(words) >= MIN_WORDS]


def draw_spans(documents: list[str], count: int, max_words: int, seed: int) -> list[str]:
    """Passages that start and end anywhere, of lengths as uneven as those of real texts.

    Args:
        documents: text to cut from.
        count: number of passages.
        max_words: lengths are drawn evenly from `MIN_WORDS` up to this; a document that ends sooner gives less.
        seed: of the draw.

    Returns:
        The passages. A document is drawn in proportion to its length.
    """
    generator = random.Random(seed)
    words = [document.split() for document in documents]
    spans = []
    for document in generator.choices(words, weights=[len(each) for each in words], k=count):
        start = generator.randrange(max(1, len(document) - MIN_WORDS))
        spans.append(" ".join(document[start : start + generator.randint(MIN_WORDS, max_words)]))
    return spans
