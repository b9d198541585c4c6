"""The data of `peft-variator train` and `restore`: what is trained on, what is held out, how batches are made."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from ..models import Task
from ..training.images import ImageFolder
from ..training.text import cut_spans, read_texts, split_spans, surroundings, tokenize


__all__ = ["Examples", "TrainingData", "load_data"]

Examples = list[dict[str, list[int]]] | Subset[dict[str, Tensor]]

MIN_TOKENS = 2


@dataclass(frozen=True)
class TrainingData:
    """Examples, and how to make batches of them.

    Args:
        train: examples to train on.
        held_out: examples to measure on, none of them in `train`.
        collate: makes a batch of a list of examples.
        tokenizer: the model's tokenizer; `None` for images.
    """

    train: Examples
    held_out: Examples
    collate: Callable[[list[Any]], dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None

    def held_out_batches(self, size: int, device: Any) -> Iterator[dict[str, Any]]:
        """The held-out examples in batches of a size."""
        for start in range(0, len(self.held_out), size):
            stop = min(start + size, len(self.held_out))
            batch = self.collate([self.held_out[index] for index in range(start, stop)])
            yield {name: value.to(device) for name, value in batch.items()}


def load_data(
    model: str,
    task: Task,
    data: str,
    *,
    column: str,
    split: str,
    max_length: int,
    wanted: int,
    held_out: int,
    seed: int,
) -> TrainingData:
    """Read text or images and hold some out.

    Args:
        model: the base model, whose tokenizer or image processor is used.
        task: how the model is used.
        data: a file, a data set, or for vision models a folder of images.
        column: column of the text in a data set.
        split: split of the data set.
        max_length: most tokens in an example.
        wanted: number of examples that are enough; no more text is read than they need.
        held_out: number of examples to hold out, at most a tenth of all.
        seed: seed of the split, and of where text is cut.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is too little data to hold anything out.
    """
    if task == "vision":
        images = ImageFolder(data, AutoImageProcessor.from_pretrained(model))
        order = list(range(len(images)))
        random.Random(seed).shuffle(order)
        count = _count_held_out(len(order), held_out, data)
        return TrainingData(Subset(images, order[count:]), Subset(images, order[:count]), default_data_collator, None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so which token it is does not matter
    examples = _text_examples(tokenizer, task, read_texts(data, column=column, split=split), max_length, wanted, seed)
    count = _count_held_out(len(examples), held_out, data)
    collate = DataCollatorWithPadding(tokenizer) if task == "encoder" else DataCollatorForSeq2Seq(tokenizer)
    # The end of the text, rather than spans here and there, whose neighbours would be trained on.
    return TrainingData(examples[:-count], examples[-count:], collate, tokenizer)


def _text_examples(
    tokenizer: PreTrainedTokenizerBase, task: Task, texts: Iterator[str], max_length: int, wanted: int, seed: int
) -> list[dict[str, list[int]]]:
    before, after = surroundings(tokenizer)
    room = max_length - len(before) - len(after)
    spans = cut_spans(tokenize(texts, tokenizer, wanted * room), room, seed)
    if task == "encoder":
        return [{"input_ids": [*before, *span, *after]} for span in spans]
    long_enough = (span for span in spans if len(span) >= MIN_TOKENS)
    return split_spans(long_enough, before, after, is_decoder=task == "seq2seq", seed=seed)


def _count_held_out(total: int, wanted: int, data: str) -> int:
    if total < 2:
        raise ValueError(f"{data} gives {total} examples; at least 2 are needed, one of them to measure on. Add data.")
    return min(wanted, max(1, total // 10))
