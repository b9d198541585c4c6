"""easy-VQA: questions about one coloured shape, packed so that an image is read once for all of its questions."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast


__all__ = [
    "COLORS",
    "IMAGE_TOKENS",
    "SHAPES",
    "Collator",
    "Example",
    "color_questions",
    "load_split",
    "make_tokenizer",
    "single_questions",
    "stack_pixels",
]

IMAGE_SIZE, PATCH_SIZE = 64, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL = ("<pad>", "<unk>", "<image>")
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class Example:
    """An image and the questions about it.

    Args:
        pixels: uint8, shape `(3, 64, 64)`.
        questions: pairs of question and answer.
    """

    pixels: Tensor
    questions: Sequence[tuple[str, str]]


def load_split(folder: Path, split: str) -> list[Example]:
    """The images of `split` ("train" or "test") with their questions, in the order of the images."""
    table = pyarrow.parquet.read_table(folder / f"{split}_images.parquet").to_pydict()
    questions: dict[int, list[tuple[str, str]]] = {number: [] for number in table["image_id"]}
    for line in (folder / f"{split}_questions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        questions[record["image_id"]].append((record["question"], record["answer"]))
    return [
        Example(_pixels(image), questions[number])
        for number, image in zip(table["image_id"], table["image_png"], strict=True)
        if questions[number]
    ]


def _pixels(png: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)).convert("RGB"))).permute(2, 0, 1).contiguous()


def stack_pixels(examples: Sequence[Example], augment: bool = False) -> Tensor:
    """Float, shape `(batch, 3, 64, 64)`, in [-1, 1]. No question asks for a direction, so mirroring is sound."""
    pixels = torch.stack([example.pixels for example in examples]).float() / 127.5 - 1
    if augment:
        for dim in (2, 3):
            mirrored = torch.rand(len(pixels)) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(dim)
    return pixels


def color_questions(examples: Sequence[Example]) -> list[Example]:
    """The images with the questions that name no shape, nor ask for one."""
    asking = [
        Example(
            example.pixels, [pair for pair in example.questions if not any(name in " ".join(pair) for name in SHAPES)]
        )
        for example in examples
    ]
    return [example for example in asking if example.questions]


def single_questions(examples: Sequence[Example]) -> list[Example]:
    """The same with one question in each example: what a user of the model would send."""
    return [Example(example.pixels, [pair]) for example in examples for pair in example.questions]


def make_tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; every answer is one token."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    texts = {text for example in examples for pair in example.questions for text in pair}
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


@dataclass
class Collator:
    """Examples as a batch for a LLaVA: image tokens, then every question with its answer.

    A question sees the image and itself, at the positions that it would have alone, so the predictions are those of
    one question at a time. Only answers have labels.

    Args:
        tokenizer: tokenizer of the model.
        augment: whether images are mirrored at random.
    """

    tokenizer: PreTrainedTokenizerFast
    augment: bool = False

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [self._row(example) for example in examples]
        longest = max(len(ids) for ids, _, _, _ in rows)
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(rows), longest), self.tokenizer.pad_token_id),
            "labels": torch.full((len(rows), longest), -100),
            "position_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        }
        owner = torch.full((len(rows), longest), -1)  # the question that a token belongs to, 0 is the image
        for row, (ids, labels, positions, owners) in enumerate(rows):
            for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions)):
                batch[name][row, : len(ids)] = torch.tensor(values)
            owner[row, : len(ids)] = torch.tensor(owners)
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
        batch["attention_mask"] = (same & torch.ones(longest, longest, dtype=torch.bool).tril()).unsqueeze(1)
        batch["pixel_values"] = stack_pixels(examples, self.augment)
        return batch

    def _row(self, example: Example) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, labels, positions, and which question each token belongs to."""
        ids = [self.tokenizer.convert_tokens_to_ids("<image>")] * IMAGE_TOKENS
        labels, positions, owners = [-100] * IMAGE_TOKENS, list(range(IMAGE_TOKENS)), [0] * IMAGE_TOKENS
        for number, (question, answer) in enumerate(example.questions, start=1):
            tokens = self.tokenizer(f"{question} {answer}")["input_ids"]
            ids += tokens
            labels += [-100] * (len(tokens) - 1) + tokens[-1:]
            positions += range(IMAGE_TOKENS, IMAGE_TOKENS + len(tokens))
            owners += [number] * len(tokens)
        return ids, labels, positions, owners
