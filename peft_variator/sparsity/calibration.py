"""Calibration data: checking what the user hands in, and making batches from a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import FeatureExtractionMixin, ImageProcessingMixin, ProcessorMixin
from transformers.image_utils import load_image

from .chains import Batch


__all__ = ["check_batches", "read_batches", "text_batches"]

PIECE = 1 << 16  # characters of a file that are read at once


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


def text_batches(
    texts: Iterable[str],
    source: str,
    processor: Any,
    *,
    samples: int,
    length: int,
    batch_size: int,
    seed: int,
    labels: bool,
    positions: int | None = None,
) -> list[Batch]:
    """Windows of texts one after the other, drawn without overlap, in batches without padding.

    Args:
        texts: lines or documents; no more of them is read than about 16 characters a token need.
        source: what they are read from, for messages.
        processor, samples, length, batch_size, seed, labels, positions: as in `read_batches`.

    Raises:
        ValueError: `length` is more than the model can read, the texts are shorter than a window, or the model reads
            no text.
    """
    _check_length(length, positions)
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if not callable(tokenizer) or isinstance(tokenizer, (FeatureExtractionMixin, ImageProcessingMixin)):
        raise ValueError(
            f"{source} is read as text, but the model has a {type(processor).__name__}, which reads none. Give .jsonl "
            'with one {"image": path} a line.'
        )
    parts, room = [], 16 * samples * length
    for text in texts:
        parts.append(text[:room])
        room -= len(text)
        if room <= 0:
            break
    # Not verbose: the whole text is longer than the model takes, the windows are not.
    found = tokenizer("".join(parts), return_attention_mask=False, verbose=False)["input_ids"]
    tokens = torch.tensor(found, dtype=torch.long)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    if not len(windows):
        raise ValueError(
            f"{source}: The text has {len(tokens)} tokens, less than one window of length={length}. Lower length, or "
            "give more text."
        )
    chosen = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]]
    batches: list[Batch] = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in chosen.split(batch_size)
    ]
    return [_with_labels(batch, source) for batch in batches] if labels else batches


def _pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # Windows starts files with a mark
            while piece := file.read(PIECE):
                yield piece
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}. Save it as such, or name another file.") from error


def _read_records(path: Path, samples: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first records of a `.jsonl`, each with the file and the line it stands in."""
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for number, line in islice(lines, samples):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f'{where} holds a {type(record).__name__}: give an object with "text", "image" or both.'
                )
            yield where, record


def _record_batch(where: str, record: dict[str, Any], folder: Path, processor: Any, length: int, column: str) -> Batch:
    """One record with text, "image" (a path beside the file) or both, as the model's processor makes it."""
    inputs: dict[str, Any] = {}
    for name in (column, "image"):
        value = record.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(
                f"{where}: {name} is {value!r}. Give {'a path' if name == 'image' else 'text'} as a string."
            )
    if record.get("image") is not None:
        try:
            inputs["images"] = load_image(str(folder / record["image"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: the image {record['image']!r} can't be read: {error}") from error
    if record.get(column) is not None:
        inputs["text"] = record[column]
    if not inputs:
        raise ValueError(f'{where}: A calibration record needs "{column}", "image" or both, but has {sorted(record)}.')
    # Cutting the text of a record with an image could cut image tokens.
    cut = {} if "images" in inputs else {"truncation": True, "max_length": length}
    try:
        return processor(**inputs, return_tensors="pt", **cut)
    # a text without its image token, or an image for a tokenizer: what is raised is up to each processor
    except Exception as error:
        raise ValueError(
            f"{where} is nothing that a {type(processor).__name__} takes: {type(error).__name__}: {error}"
        ) from error


def read_batches(
    path: Path,
    processor: Any,
    *,
    samples: int,
    length: int,
    batch_size: int,
    seed: int,
    labels: bool,
    positions: int | None = None,
    column: str = "text",
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
        positions: most tokens that the model can read, None where there is no limit.
        column: what the text is called in the records of `.jsonl`.

    Raises:
        OSError: the file can't be read.
        ValueError: `length` is more than the model can read, the text is shorter than a window, or a record can't be
            used; the message names file and line.
    """
    if path.suffix.lower() != ".jsonl":
        windows = {"samples": samples, "length": length, "batch_size": batch_size, "seed": seed}
        return text_batches(_pieces(path), str(path), processor, labels=labels, positions=positions, **windows)
    batches = []
    for where, record in _read_records(path, samples):
        if record.get("image") is None:  # else nothing is cut
            _check_length(length, positions)
        batch = _record_batch(where, record, path.parent, processor, length, column)
        batches.append(_with_labels(batch, where) if labels else batch)
    if not batches:
        raise ValueError(f"{path} has no record: give one with text, image or both a line.")
    return batches


def _check_length(length: int, positions: int | None) -> None:
    if positions is not None and length > positions:
        raise ValueError(f"length={length} is more than the {positions} positions of the model. Lower it.")


def _with_labels(batch: Batch, where: str) -> Batch:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(f"{where} has no text to take labels from, which this way of pruning needs. Add text.")
    return {**batch, "labels": batch["input_ids"]}
