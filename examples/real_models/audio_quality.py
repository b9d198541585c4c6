"""What a speech recogniser writes down: word error rates against what was said and against the base's transcript."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from texts import DIGITS, SAMPLING_RATE, Utterance, digit_utterances, spoken_sentences, wikitext2
from transformers import PreTrainedModel, PreTrainedTokenizerBase, WhisperFeatureExtractor


__all__ = ["spoken_digits", "spoken_text", "word_errors"]

BATCH = 8
MAX_NEW_TOKENS = 96
SHOWN = 5  # utterances with the most errors


def spoken_digits(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: WhisperFeatureExtractor,
    data: Path,
    limit: int | None,
) -> dict[str, Any]:
    """Word error rates, in percent, on utterances of digits."""
    utterances = digit_utterances(data, 200 if limit is None else limit, is_test=True)
    return _rates(model, base, tokenizer, features, utterances)


def spoken_text(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: WhisperFeatureExtractor,
    data: Path,
    limit: int | None,
) -> dict[str, Any]:
    """Word error rates, in percent, on sentences of WikiText-2 test that eSpeak NG reads."""
    sentences = [
        sentence
        for paragraph in wikitext2(data, "test")
        for sentence in re.split(r"(?<=[.!?])\s+", paragraph)
        # What has digits or rare marks is written in more than one way; long ones do not fit into 30 seconds.
        if re.fullmatch(r"[A-Za-z ,'.]+", sentence) and 8 <= len(sentence.split()) <= 25 and "unknown" not in sentence
    ]
    count = 100 if limit is None else limit
    chosen = sentences[:: max(1, len(sentences) // count)][:count]
    return _rates(model, base, tokenizer, features, spoken_sentences(chosen))


def _rates(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: WhisperFeatureExtractor,
    utterances: Sequence[Utterance],
) -> dict[str, Any]:
    found = _transcripts(model, tokenizer, features, utterances)
    expected = found if model is base else _transcripts(base, tokenizer, features, utterances)
    said = [_words(utterance.text) for utterance in utterances]
    return {
        "wer": _rate(found, said),
        "wer_to_base": _rate(found, expected),
        # A transcript that ends in a loop has as many errors as a dozen others.
        "most_errors_to_base": sorted(map(word_errors, found, expected), reverse=True)[:SHOWN],
        "errors_to_base": sum(map(word_errors, found, expected)),
        "utterances": len(utterances),
        "words": sum(map(len, said)),
        "example": " ".join(found[0]),
    }


@torch.inference_mode()
def _transcripts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: WhisperFeatureExtractor,
    utterances: Sequence[Utterance],
) -> list[list[str]]:
    transcripts = []
    for start in range(0, len(utterances), BATCH):
        audio = [utterance.audio for utterance in utterances[start : start + BATCH]]
        inputs = features(audio, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_features"]
        ids = model.generate(input_features=inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        transcripts += [_words(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return transcripts


def _words(text: str) -> list[str]:
    """Lower-case words without marks; numerals digit by digit, as they are said in the utterances."""
    spelt = re.sub(r"\d", lambda match: f" {DIGITS[int(match[0])]} ", text.lower())
    return re.sub(r"[^\w\s]", "", spelt.replace("-", " ")).split()


def _rate(found: Sequence[list[str]], expected: Sequence[list[str]]) -> float:
    errors = sum(word_errors(left, right) for left, right in zip(found, expected, strict=True))
    return 100 * errors / sum(map(len, expected))


def word_errors(found: Sequence[str], expected: Sequence[str]) -> int:
    """Least number of words that have to be inserted, left out or replaced (Levenshtein's distance)."""
    row = list(range(len(expected) + 1))
    for count, word in enumerate(found, start=1):
        diagonal, row[0] = row[0], count
        for place, other in enumerate(expected, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (word != other))
    return row[-1]
