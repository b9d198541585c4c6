"""One interface to every task: its model, its features, its score."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from scores import SCORES, squad_f1
from squad import answers, features, read_questions
from tasks import TASKS, Example, read_examples
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


__all__ = ["Problem", "load_problem", "predict"]

Features = list[dict[str, Any]]


class Problem(Protocol):
    """A task with its rows read.

    Attributes:
        metric: name of the score.
        new_modules: names of the modules that are trained in full, because they are new or fit the new head.
        epochs: passes over the training rows when the task is learned.
        train: features to train on.
        test: features to test on.
    """

    metric: str
    new_modules: tuple[str, ...]
    epochs: int
    train: Features
    test: Features

    def load(self, path: str) -> PreTrainedModel:
        """The base model with the task's head."""

    def score(self, logits: list[Any]) -> float:
        """The score of the test features' logits, in points (0 to 100)."""


class SentenceProblem:
    """A task of single sentences or pairs."""

    new_modules = ("classifier", "pooler")

    def __init__(self, data: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = TASKS[name]
        self.metric, self.epochs = self.task.metric, self.task.epochs
        train, test = read_examples(data, name)
        self.train, self.test = self._features(train, tokenizer), self._features(test, tokenizer)

    def _features(self, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> Features:
        texts = list(zip(*(example.texts for example in examples), strict=True))
        encoded = tokenizer(*[list(column) for column in texts], truncation=True, max_length=128)
        label_type = float if self.task.num_labels == 1 else int
        return [
            {name: column[row] for name, column in encoded.items()} | {"labels": label_type(example.label)}
            for row, example in enumerate(examples)
        ]

    def load(self, path: str) -> PreTrainedModel:
        """The base model with the task's head."""
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=self.task.num_labels)

    def score(self, logits: list[torch.Tensor]) -> float:
        """The score of the test features' logits, in points."""
        stacked = torch.stack(logits)
        predictions = stacked.squeeze(1) if self.task.num_labels == 1 else stacked.argmax(1)
        references = [feature["labels"] for feature in self.test]
        return 100 * SCORES[self.metric](predictions.tolist(), references)


class SquadProblem:
    """Extractive question answering."""

    new_modules, metric, epochs = ("qa_outputs",), "f1", 1

    def __init__(self, data: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        train, self.questions = read_questions(data)
        self.windows = features(self.questions, tokenizer)
        self.train, self.test = _plain(features(train, tokenizer)), _plain(self.windows)

    def load(self, path: str) -> PreTrainedModel:
        """The base model with a head for the start and the end of the answer."""
        return AutoModelForQuestionAnswering.from_pretrained(path)

    def score(self, logits: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """F1 over words, in points."""
        given = answers(self.questions, self.windows, logits)
        return 100 * squad_f1(given, [question.answers["text"] for question in self.questions])


def _plain(windows: Features) -> Features:
    return [{name: value for name, value in row.items() if name not in ("source", "spans")} for row in windows]


def load_problem(data: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> Problem:
    """Read a task.

    Args:
        data: folder that holds a folder a data set.
        name: one of `TASKS`, or "squad".
        tokenizer: tokenizer of the base model.
    """
    return (SquadProblem if name == "squad" else SentenceProblem)(data, name, tokenizer)


@torch.inference_mode()
def predict(model: torch.nn.Module, rows: Features, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[Any]:
    """Logits of every row, in order; rows of like length share a batch.

    Returns:
        One tensor a row, or the pair of start and end logits.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    found: dict[int, Any] = {}
    names = ("input_ids", "attention_mask", "token_type_ids")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad([{name: rows[row][name] for name in names} for row in chosen], return_tensors="pt")
        outputs = model(**batch)
        logits = (outputs.start_logits, outputs.end_logits) if "start_logits" in outputs else (outputs.logits,)
        for row, *values in zip(chosen, *logits, strict=True):
            found[row] = values[0] if len(values) == 1 else tuple(values)
    return [found[row] for row in range(len(rows))]
