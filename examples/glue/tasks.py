"""The tasks: where their files are, how a row is read, and what is measured."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


__all__ = ["TASKS", "Example", "Task", "read_examples"]


@dataclass(frozen=True)
class Example:
    """One row: one or two texts and a label (a class number, or a score)."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Task:
    """A task of single sentences or pairs.

    Args:
        train: file of the training rows, relative to the data folder.
        test: file of the rows the score is computed on; the training file again where it has to be split.
        row: takes a row's columns, gives the example.
        metric: name of the score, one of `scores.SCORES`.
        header: whether the first line names the columns.
        num_labels: number of classes; 1 for a score.
        epochs: passes over the training rows when the task is learned.
        seeds: how many seeds the plugin is adapted with; small sets need several.
        start: the task whose model it is learned from, for a task that the plain base does not learn.
    """

    train: str
    test: str
    row: Callable[[Sequence[str]], Example]
    metric: str = "accuracy"
    header: bool = True
    num_labels: int = 2
    epochs: int = 3
    seeds: int = 1
    start: str | None = None


def _pair(first: int, second: int, label: int, classes: Sequence[str]) -> Callable[[Sequence[str]], Example]:
    return lambda row: Example((row[first], row[second]), classes.index(row[label]))


TASKS: dict[str, Task] = {
    "sst2": Task(
        "sst2/train.tsv", "sst2/test.tsv", lambda row: Example((row[0],), int(row[1])), header=False, epochs=2
    ),
    "mrpc": Task("mrpc/train.tsv", "mrpc/test.tsv", _pair(3, 4, 0, "01"), seeds=3),
    # Learned from all-MiniLM-L6-v2 itself it stays near chance.
    "rte": Task(
        "rte/train.tsv",
        "rte/dev.tsv",
        _pair(1, 2, 3, ("entailment", "not_entailment")),
        epochs=4,
        seeds=3,
        start="qnli",
    ),
    # The training file of QNLI is not at hand: its development file is split by question.
    "qnli": Task("qnli_dev/dev.tsv", "qnli_dev/dev.tsv", _pair(1, 2, 3, ("entailment", "not_entailment")), epochs=2),
    # Balanced subsets, so accuracy is not comparable with GLUE's QQP.
    "qqp": Task("qqp_10k/train.tsv", "qqp_10k/eval.tsv", _pair(1, 2, 0, "01"), epochs=1),
    "stsb": Task(
        "stsb/sts-train.csv",
        "stsb/sts-test.csv",
        lambda row: Example((row[5], row[6]), float(row[4])),
        metric="spearmanr",
        header=False,
        num_labels=1,
        epochs=2,
        seeds=3,
    ),
}


def _read(path: Path, task: Task) -> list[Example]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. --data has to name the folder that holds {task.train}.")
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [task.row(row) for row in rows[task.header :]]


def read_examples(data: Path, name: str) -> tuple[list[Example], list[Example]]:
    """Training and test examples of a task.

    Args:
        data: folder that holds a folder a data set.
        name: one of `TASKS`.

    Raises:
        FileNotFoundError: a file is missing.
    """
    task = TASKS[name]
    train = _read(data / task.train, task)
    if task.train != task.test:
        return train, _read(data / task.test, task)
    # Whole questions go to one side, by a rule that needs no random numbers: every fifth distinct one is tested.
    order = {text: number for number, text in enumerate(dict.fromkeys(example.texts[0] for example in train))}
    is_test = [order[example.texts[0]] % 5 == 0 for example in train]
    return (
        [example for example, test in zip(train, is_test, strict=True) if not test],
        [example for example, test in zip(train, is_test, strict=True) if test],
    )
