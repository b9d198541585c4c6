"""Calibration data: checking what the user hands in, and making batches from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.image_utils import load_image

from .calls import Batch


__all__ = ["check_batches", "read_batches"]


def _check_tensor(number: int, key: str, value: Tensor) -> None:
    if value.numel() == 0:
        raise ValueError(f"Calibration batch {number} is empty: {key} has shape {tuple(value.shape)}.")
    if value.is_floating_point() and value.isnan().any():
        raise ValueError(f"Calibration batch {number} holds NaN in {key}. Check how the data was prepared.")


def check_batches(calibration: Iterable[Batch] | None) -> list[Batch]:
    """The calibration batches as a list.

    Raises:
        ValueError: there are none, or one is empty or holds NaN.
        TypeError: one is neither a mapping nor a tensor.
    """
    batches = [] if calibration is None else list(calibration)
    if not batches:
        what = "missing" if calibration is None else "empty"
        raise ValueError(
            f"The calibration set is {what}. Pass calibration=, an iterable of at least one batch; only uniform "
            "magnitude pruning works without."
        )
    for number, batch in enumerate(batches):
        if not isinstance(batch, (Mapping, Tensor)):
            raise TypeError(
                f"Calibration batch {number} is a {type(batch).__name__}. A batch is a dict of what the model's "
                "forward takes (as a tokenizer or processor returns it), or one tensor."
            )
        named = batch.items() if isinstance(batch, Mapping) else [("the tensor", batch)]
        for key, value in named:
            if isinstance(value, Tensor):
                _check_tensor(number, repr(key), value)
    return batches


def _text_batches(text: str, processor: Any, samples: int, length: int, batch_size: int, seed: int) -> list[Batch]:
    """`samples` windows of `length` tokens each, drawn without overlap, in batches without padding."""
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    # Not verbose: the whole text is longer than the model takes, the windows are not.
    tokens = torch.tensor(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(windows):
        raise ValueError(f"The text has {len(tokens)} tokens, less than one window of length={length}. Lower length.")
    chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]]
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in chosen.split(batch_size)]


def _record_batch(record: dict[str, Any], folder: Path, processor: Any, length: int) -> Batch:
    """One record with "text", "image" (a path beside the file) or both, as the model's processor makes it."""
    inputs = {}
    if "image" in record:
        inputs["images"] = load_image(str(folder / record["image"]))
    if "text" in record:
        inputs["text"] = record["text"]
    if not inputs:
        raise ValueError(f'A calibration record needs "text", "image" or both, but has {sorted(record)}.')
    # Cutting the text of a record with an image could cut image tokens.
    cut = {} if "image" in record else {"truncation": True, "max_length": length}
    return processor(**inputs, return_tensors="pt", **cut)


def read_batches(
    path: Path, processor: Any, *, samples: int, length: int, batch_size: int, seed: int, labels: bool
) -> list[Batch]:
    """Calibration batches from a file.

    Args:
        path: plain text, or `.jsonl` with one {"text": ..., "image": path} a line, each a batch of its own.
        processor: the model's tokenizer or processor.
        samples: number of windows or records. No more of a text is read than about 16 characters a token need.
        length: tokens in a window; longer records without image are cut.
        batch_size: windows in a batch.
        seed: which windows are drawn.
        labels: add `labels` equal to `input_ids`, for a language-modelling loss.

    Raises:
        ValueError: the text is shorter than a window, or a record has neither text nor image.
    """
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in islice((line for line in file if line.strip()), samples)]
            batches = [_record_batch(record, path.parent, processor, length) for record in records]
        else:
            batches = _text_batches(file.read(16 * samples * length), processor, samples, length, batch_size, seed)
    if labels:
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches if isinstance(batch, Mapping)]
    return batches
