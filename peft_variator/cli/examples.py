"""The user's texts and images as examples: to train on, and to measure a saved plugin on."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    MODEL_MAPPING,
    AutoImageProcessor,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..field_types import shown
from ..model_files import load_tokenizer
from ..models import Task, load_config, takes_videos
from ..profiling import count_positions
from ..sentence_folder import read_recipe
from ..training.data import (
    FEWEST_TOKENS,
    ImageFolder,
    collate_images,
    cut_documents,
    cut_sentences_and_spans,
    is_plain_text,
    read_documents,
    read_texts,
    split_sentences,
    split_spans,
    surroundings,
    tokenize_documents,
)
from ..training.loss_masks import CAUSAL, prediction_of, stacks_of
from .console import Reporter


__all__ = [
    "Batch",
    "EvaluationData",
    "Examples",
    "TrainingData",
    "check_data_options",
    "data_words",
    "load_data",
    "load_evaluation_data",
    "warn_about_unreadable",
]

Batch = dict[str, Any]
Examples = list[dict[str, list[int]]] | Subset[dict[str, Tensor]]

# Of so many examples one may be held out.
SHARE_HELD_OUT = 10
MIN_TOKENS = 2  # a prompt and a continuation
# Batches that are timed at most; quality is measured on all.
TIMED_BATCHES = 8
# A tokenizer without a limit tells a number like this or more.
NO_LIMIT = 10**9


@dataclass(frozen=True)
class TrainingData:
    """Examples, and how to make batches of them.

    Args:
        train: examples to train on.
        held_out: examples to measure on, none of them in `train`.
        collate: makes a batch of a list of examples.
        tokenizer: the model's tokenizer; `None` for images.
        unreadable: files that were passed over because they can't be read.
    """

    train: Examples
    held_out: Examples
    collate: Callable[[list[Any]], Mapping[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None
    unreadable: Sequence[str] = ()

    def held_out_batches(self, size: int, device: Any) -> Iterator[dict[str, Any]]:
        """The held-out examples in batches of a size."""
        yield from self._batches(self.held_out, range(len(self.held_out)), size, device)

    def drawn_batches(self, count: int, size: int, device: Any, seed: int) -> Iterator[dict[str, Any]]:
        """A few batches of a size, of examples to train on: what is chosen by data is not by what is held out."""
        there = range(len(self.train))
        drawn = random.Random(f"batches, seed {seed}").sample(there, min(count * size, len(there)))
        yield from self._batches(self.train, drawn, size, device)

    def _batches(self, examples: Examples, chosen: Sequence[int], size: int, device: Any) -> Iterator[dict[str, Any]]:
        for start in range(0, len(chosen), size):  # images are read batch by batch
            batch = self.collate([examples[index] for index in chosen[start : start + size]])
            yield {name: value.to(device) for name, value in batch.items()}


def load_data(
    model: str,
    task: Task,
    data: Sequence[str],
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
        data: files, data sets, or for vision models folders of images.
        column: column of the text in tables and data sets.
        split: split of the data set.
        max_length: most tokens in an example.
        wanted: number of examples to train on that are enough; no more text or images are read than they and the
            held-out ones need, of every file as much.
        held_out: number of examples to hold out, at most a tenth of all.
        seed: seed of the split, and of where text is cut: an encoder's into sentences and spans, others' into spans.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is too little data to hold anything out.
    """
    check_data_options(data, column, split, images=task == "vision")
    names = ", ".join(data)
    # However few are trained on, as many are held out as were asked for: so many are read that those are a tenth.
    wanted = max(wanted + held_out, held_out * SHARE_HELD_OUT)
    if task == "vision":
        config = load_config(model)
        images = _open_images(model, config, MODEL_MAPPING[type(config)], data)
        drawn, unreadable = images.draw(wanted, seed)
        if unreadable and len(drawn) < 2:
            raise ValueError(f"Of {len(images)} images in {names} only {len(drawn)} can be read. Add images.")
        count = _count_held_out(len(drawn), held_out, names)
        parts = Subset(images, drawn[count:]), Subset(images, drawn[:count])
        return TrainingData(*parts, collate_images, None, [str(path) for path in unreadable])
    tokenizer = _load_tokenizer(model)
    before, after = surroundings(tokenizer)
    room = max_length - len(before) - len(after)
    if room < FEWEST_TOKENS:
        raise ValueError(
            f"--max-length is {max_length}, of which special tokens leave {max(room, 0)}: too few to merge anything "
            f"in. Give {max_length - room + FEWEST_TOKENS} or more."
        )
    sources = [read_documents(name, column=column, split=split) for name in data]
    cut = cut_documents
    if task == "encoder":
        sources, cut = [map(_sentences, documents) for documents in sources], cut_sentences_and_spans
    spans = [
        cut(documents, room, seed + index)
        for index, documents in enumerate(tokenize_documents(sources, tokenizer, wanted * room))
    ]
    for name, each in zip(data, spans, strict=True):
        if not each:
            raise ValueError(f"{name} holds no text. Leave it out, or name another file.")
    if task != "encoder":
        spans = [[span for span in each if len(span) >= MIN_TOKENS] for each in spans]
    count = _count_held_out(sum(map(len, spans)), held_out, names)
    # The end of each file, rather than spans here and there, whose neighbours would be trained on.
    ends = _shares([len(each) for each in spans], count)
    ordered = [span for each, end in zip(spans, ends, strict=True) for span in each[: len(each) - end]]
    ordered += [span for each, end in zip(spans, ends, strict=True) for span in each[len(each) - end :]]
    if task == "encoder":
        examples = [{"input_ids": [*before, *span, *after]} for span in ordered]
    else:
        examples = split_spans(ordered, before, after, is_decoder=task == "seq2seq", seed=seed)
    return TrainingData(examples[:-count], examples[-count:], _collator(tokenizer, task != "encoder"), tokenizer)


def _sentences(pieces: Iterable[str]) -> Iterator[str]:
    return (sentence for piece in pieces for sentence in split_sentences(piece))


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so which token it is does not matter
    return tokenizer


def _open_images(
    model: str, config: PreTrainedConfig, cls: type[PreTrainedModel], folders: Sequence[str]
) -> ImageFolder:
    """The images of folders, with all that a model takes of what its processor makes of them.

    Raises:
        ValueError: the model takes videos, or there is no image processor or no image.
    """
    if takes_videos(config):
        raise ValueError(
            f"{model} (architecture {config.model_type!r}) takes videos, and only texts and images are read here. Use "
            "it in Python: DistillationTrainer and measure_quality take any batch."
        )
    return ImageFolder(folders, _load_image_processor(model), inspect.signature(cls.forward).parameters)


def _load_image_processor(name: str) -> Any:
    """What makes a model's inputs of images.

    Raises:
        ValueError: the model's folder has none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} has no image processor that can be read"
            f"{'' if Path(name).is_dir() else f' ({shown(error)})'}. Save that of the model in its folder: "
            "AutoImageProcessor.from_pretrained(NAME).save_pretrained(FOLDER)."
        ) from error


def _collator(tokenizer: PreTrainedTokenizerBase, has_labels: bool) -> Callable[[list[Any]], Mapping[str, Any]]:
    return DataCollatorForSeq2Seq(tokenizer) if has_labels else DataCollatorWithPadding(tokenizer)


def _shares(sizes: list[int], count: int) -> list[int]:
    """`count` things in proportion to sizes, whole numbers that add up to it, none larger than its size."""
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    marks = [0, *(end * count // max(1, ends[-1]) for end in ends)]
    return [high - low for low, high in zip(marks[:-1], marks[1:], strict=True)]


def _count_held_out(total: int, wanted: int, data: str) -> int:
    if total < 2:
        given = f"{total} example{'' if total == 1 else 's'}"
        raise ValueError(f"{data} gives {given}; at least 2 are needed, one of them to measure on. Add data.")
    return min(wanted, max(1, total // SHARE_HELD_OUT))


@dataclass(frozen=True)
class EvaluationData:
    """Batches of the user's examples, on the device of the model.

    Args:
        quality: batches to measure quality on.
        timed: batches to take the time of, of the first of these examples.
        count: number of examples.
        lengths: tokens of each text, as the model gets it; empty for images.
        cut: texts that were longer than the model can read, and cut.
        unreadable: images that were passed over because they can't be read.
    """

    quality: list[Batch]
    timed: list[Batch]
    count: int
    lengths: Sequence[int] = ()
    cut: int = 0
    unreadable: Sequence[str] = ()


def load_evaluation_data(
    name: str,
    base: PreTrainedModel,
    data: Sequence[str],
    *,
    column: str,
    split: str,
    wanted: int,
    batch_size: int,
    seed: int,
) -> EvaluationData:
    """Read texts or images to measure a model on.

    Args:
        name: folder or Hub name of the model, whose tokenizer or image processor is used.
        base: the model, where it runs.
        data: files of texts, data sets, or for vision models folders of images.
        column: column of the text in tables and data sets.
        split: split of the data set.
        wanted: number of examples that are used at most.
        batch_size: examples in a batch.
        seed: seed of which examples are used, and of where a text is cut into prompt and continuation.

    Raises:
        OSError: there is no such file or folder.
        ValueError: there is nothing in it that the model can read.
    """

    def batches(collate: Callable[[list[Any]], Mapping[str, Any]], examples: Sequence[Any]) -> list[Batch]:
        parts = (list(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size))
        return [_to_model(collate(part), base) for part in parts]

    check_data_options(data, column, split, images=base.main_input_name == "pixel_values")
    names = ", ".join(data)
    if base.main_input_name == "pixel_values":
        images = _open_images(name, base.config, type(base), data)
        drawn, unreadable = images.draw(wanted, seed)
        if not drawn:
            raise ValueError(f"None of the {len(images)} images in {names} can be read. Add images.")
        found = batches(collate_images, [images[index] for index in drawn])
        return EvaluationData(found, found[:TIMED_BATCHES], len(drawn), unreadable=[str(path) for path in unreadable])

    texts = _draw_texts(data, column, split, wanted, seed)
    tokenizer = _load_tokenizer(name)
    before, after = surroundings(tokenizer)
    most = [tokenizer.model_max_length, count_positions(base.config), read_recipe(name).max_length]
    room = min([limit for limit in most if limit and limit < NO_LIMIT], default=NO_LIMIT) - len(before) - len(after)
    tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bodies = [ids[:room] for ids in tokens if ids]  # a tokenizer may leave nothing of a text
    if not bodies:
        raise ValueError(f"{names}: the tokenizer of {name} leaves nothing of its texts.")
    is_causal, has_decoder = prediction_of(base) is CAUSAL, len(stacks_of(base)) > 1
    if is_causal or has_decoder:
        # Continuations: a model that generates is judged by what it makes of a prompt.
        pairs = [ids for ids in bodies if len(ids) >= MIN_TOKENS]
        if not pairs:
            raise ValueError(f"{names}: no text has the {MIN_TOKENS} tokens that a prompt and a continuation need.")
        records = split_spans(pairs, before, after, is_decoder=has_decoder, seed=seed)
    else:
        records = [{"input_ids": [*before, *ids, *after]} for ids in bodies]
    quality = batches(_collator(tokenizer, is_causal or has_decoder), records)
    timed = quality[:TIMED_BATCHES]
    if is_causal:  # a prefill, as `generate` runs it
        tokenizer.padding_side = "left"
        prompts = [{"input_ids": [*before, *ids]} for ids in bodies[: TIMED_BATCHES * batch_size]]
        prefill = {"use_cache": True, "logits_to_keep": 1}
        timed = [batch | prefill for batch in batches(_collator(tokenizer, False), prompts)]
    lengths = [len(before) + len(ids) + len(after) for ids in bodies]
    return EvaluationData(quality, timed, len(records), lengths, sum(len(ids) > room for ids in tokens))


def _draw_texts(data: Sequence[str], column: str, split: str, wanted: int, seed: int) -> list[str]:
    """At most so many of the texts that are not empty, in their order."""
    lines = chain.from_iterable(read_texts(name, column=column, split=split) for name in data)
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{', '.join(data)} holds no text. Give a file with a text on each line.")
    if len(texts) <= wanted:
        return texts
    return [texts[place] for place in sorted(random.Random(seed).sample(range(len(texts)), wanted))]


def _to_model(batch: Mapping[str, Any], model: PreTrainedModel) -> Batch:
    """The batch on the model's device, its floats in the model's dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def warn_about_unreadable(unreadable: Sequence[str], read: int, reporter: Reporter) -> None:
    """Tell how many images were passed over, and the first of them."""
    if unreadable:
        reporter.warn(
            f"Skipped {len(unreadable)} of {len(unreadable) + read} images that can't be read; the first is "
            f"{unreadable[0]}."
        )


def _chosen(column: str, split: str) -> dict[str, str]:
    """Those of the options that say what of some data is read which are not the defaults."""
    options = {"--text-column": (column, "text"), "--split": (split, "train")}
    return {option: value for option, (value, default) in options.items() if value != default}


def data_words(data: Sequence[str], column: str, split: str) -> list[str]:
    """The options of a command line that name some data; a column or a split only where it is not the default."""
    words = [word for name in data for word in ("--data", name)]
    return words + [word for option in _chosen(column, split).items() for word in option]


def check_data_options(data: Sequence[str], column: str, split: str, *, images: bool = False) -> None:
    """Refuse a column where there are no columns, and a split where there are no splits.

    Args:
        data: files, data sets, or folders of images.
        column: column of the text in tables and data sets.
        split: split of the data set.
        images: images are read, in folders.

    Raises:
        ValueError: one of them is not the default, and none of the data has such a thing.
    """
    has = {
        "--text-column": not images and not all(is_plain_text(name) for name in data),
        "--split": not images and not all(Path(name).is_file() for name in data),
    }
    of = {"--text-column": "a table or a data set", "--split": "a data set"}
    for option, value in _chosen(column, split).items():
        if data and not has[option]:
            names = ", ".join(data)
            raise ValueError(f"{option} {value} chooses a part of {of[option]}, and {names} is none. Leave it out.")
