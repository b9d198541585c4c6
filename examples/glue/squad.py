"""SQuAD v1.1 as features for an extractive model, and answers from its logits."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


__all__ = ["Question", "answers", "features", "read_questions"]

MAX_LENGTH = 256
STRIDE = 64
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True)
class Question:
    """A question, its paragraph and the answers people gave."""

    key: str
    question: str
    context: str
    answers: dict[str, Any]


def read_questions(data: Path) -> tuple[list[Question], list[Question]]:
    """Questions to train on and to test on: of the 48 articles, every fourth is tested.

    Args:
        data: folder that holds `squad_v1_dev/dev-v1.1.json.zip`.
    """
    with zipfile.ZipFile(data / "squad_v1_dev" / "dev-v1.1.json.zip") as archive:
        articles = json.loads(archive.read("dev-v1.1.json"))["data"]
    sides: tuple[list[Question], list[Question]] = ([], [])
    for number, article in enumerate(articles):
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                given = {name: [answer[name] for answer in entry["answers"]] for name in ("text", "answer_start")}
                question = Question(entry["id"], entry["question"], paragraph["context"], given)
                sides[number % 4 == 0].append(question)
    return sides


def features(questions: list[Question], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Windows over each paragraph, with the answer's tokens (0, 0 where it is not in the window)."""
    encoded = tokenizer(
        [question.question for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for index, source in enumerate(encoded["overflow_to_sample_mapping"]):
        in_context = [part == 1 for part in encoded.sequence_ids(index)]
        spans = [
            span if inside else None for span, inside in zip(encoded["offset_mapping"][index], in_context, strict=True)
        ]
        start, end = _answer_tokens(questions[source], spans)
        window = {name: encoded[name][index] for name in ("input_ids", "attention_mask", "token_type_ids")}
        windows.append(window | {"start_positions": start, "end_positions": end, "source": source, "spans": spans})
    return windows


def _answer_tokens(question: Question, spans: list[tuple[int, int] | None]) -> tuple[int, int]:
    first = question.answers["answer_start"][0]
    last = first + len(question.answers["text"][0])
    inside = [token for token, span in enumerate(spans) if span and span[0] < last and span[1] > first]
    complete = inside and spans[inside[0]][0] <= first and spans[inside[-1]][1] >= last
    return (inside[0], inside[-1]) if complete else (0, 0)


def answers(
    questions: list[Question], windows: list[dict[str, Any]], logits: list[tuple[Tensor, Tensor]]
) -> list[str]:
    """The best answer to each question over its windows.

    Args:
        questions: the questions.
        windows: their features.
        logits: start and end logits of each window, shape `(length,)` each.
    """
    best: dict[int, tuple[float, str]] = {}
    for window, (start, end) in zip(windows, logits, strict=True):
        spans = window["spans"]
        allowed = torch.tensor([span is not None for span in spans])
        scores = start[: len(spans), None] + end[None, : len(spans)]
        ordered = torch.ones_like(scores, dtype=torch.bool).triu().tril(MAX_ANSWER_TOKENS - 1)
        scores = scores.masked_fill(~(ordered & allowed[:, None] & allowed[None]), -torch.inf)
        score, place = scores.flatten().max(0)
        first, last = divmod(int(place), len(spans))
        text = questions[window["source"]].context[spans[first][0] : spans[last][1]]
        if window["source"] not in best or float(score) > best[window["source"]][0]:
            best[window["source"]] = (float(score), text)
    return [best[number][1] for number in range(len(questions))]
