"""`peft-variator prune`: a dense model in, a sparse model out; and `inspect`: how sparse a checkpoint is."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel

from ..bases.config import pop_quantization, read_quantization
from ..field_types import name_some
from ..files import new_folder
from ..model_files import check_vocabulary, read_model_config
from ..models import find_task, load_whole, model_class
from ..profiling import count_positions, find_device
from ..sentence_folder import copy_files, sentence_files
from ..sparsity import PruningConfig, SparsityReport, inspect_checkpoint, prune
from ..sparsity.calibration import read_batches, text_batches
from ..sparsity.chains import Batch
from ..training.data import TABLES, ImageFolder, collate_images, read_texts
from .console import Reporter, next_commands
from .examples import check_data_options, data_words, warn_about_unreadable
from .publishing import Publishing


__all__ = ["REPORT_NAME", "PruneSettings", "inspect", "parse_amounts", "prune_model"]

REPORT_NAME = "sparsity_report.json"
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # what Accelerate spreads a model by


@dataclass(frozen=True)
class PruneSettings:
    """What is pruned, on which data, and where it goes; each is an option of the command."""

    model: str
    output: Path
    config: PruningConfig
    data: list[str]
    text_column: str
    split: str
    samples: int
    length: int
    batch_size: int
    dtype: str
    device: str
    publishing: Publishing = Publishing()


def prune_model(settings: PruneSettings, reporter: Reporter) -> None:
    """Prune a model, save it with a report of its zeros, and tell."""
    config, data, method = settings.config, settings.data, settings.config.pruning_method
    reporter.check()
    settings.publishing.check()
    if not data and (method.statistics is not None or config.allocation == "ecoflap"):
        raise ValueError(
            f"method={method.name!r} with allocation={config.allocation!r} needs calibration data: give --data."
        )
    with tempfile.TemporaryDirectory(prefix="peft-variator-offload-") as offload_folder:
        loaded = _load(settings.model, settings.dtype, settings.device, offload_folder)
        images = loaded.main_input_name == "pixel_values"
        check_data_options(settings.data, settings.text_column, settings.split, images=images)
        pipeline = sentence_files(settings.model)
        processor = _load_processor(settings.model, needed=bool(data))
        windows = {
            "samples": settings.samples,
            "length": settings.length,
            "batch_size": settings.batch_size,
            "seed": config.seed,
        }
        batches, samples = _calibration(settings, loaded, processor, windows, reporter) if data else (None, 0)
        if data and samples < settings.samples:
            reporter.warn(
                f"The data has no more than {samples} of the {settings.samples} samples that --samples asks for: that "
                "is what the model is calibrated on. Give more, or a smaller --length for texts."
            )
        report = prune(loaded, config, batches, progress=not reporter.quiet)
        read = (data[0] if len(data) == 1 else data) if data else None
        report.source.update(model=settings.model, data=read, **{**windows, "samples": samples})
        with new_folder(settings.output) as folder:
            loaded.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
            copy_files(pipeline, folder)
            report.save_json(folder / REPORT_NAME)
            settings.publishing.set_license(folder)
    reporter.write_json(report.to_json())
    can_restore = bool(data) and processor is not None and _is_of_one_tower(loaded)
    if loaded.main_input_name == "pixel_values":
        can_restore &= all(Path(name).is_dir() for name in data)  # it reads images in folders alone
    _show(report, settings, processor is not None, can_restore, reporter)
    settings.publishing.push(settings.output, reporter)


def _calibration(
    settings: PruneSettings, model: PreTrainedModel, processor: Any, windows: dict[str, int], reporter: Reporter
) -> tuple[list[Batch], int]:
    """Batches of all data, of every file or folder as many windows, records or images, and how many these are."""
    # An encoder–decoder makes its decoder's inputs of them.
    labels = model.can_generate() and (settings.config.allocation == "ecoflap" or model.config.is_encoder_decoder)
    how: dict[str, Any] = {"labels": labels, "positions": count_positions(model.config)}
    batches: list[Batch] = []
    samples = 0
    share, over = divmod(settings.samples, len(settings.data))
    for index, name in enumerate(settings.data):
        path, column = Path(name), settings.text_column
        each: dict[str, Any] = {**windows, "samples": max(1, share + (index < over))}
        if path.is_dir() and model.main_input_name == "pixel_values":
            own = _image_batches(name, model, processor, each, reporter)
        elif path.is_file() and path.suffix.lower() not in TABLES.keys() - {".jsonl"}:
            own = read_batches(path, processor, column=column, **each, **how)
        else:
            texts = (f"{text}\n" for text in read_texts(name, column=column, split=settings.split))
            own = text_batches(texts, name, processor, **each, **how)
        batches += own
        # A record is a batch, and an image in it can be many rows.
        is_records = path.suffix.lower() == ".jsonl"
        samples += len(own) if is_records else sum(len(next(iter(batch.values()))) for batch in own)
    return batches, samples


def _image_batches(
    folder: str, model: PreTrainedModel, processor: Any, windows: dict[str, int], reporter: Reporter
) -> list[Batch]:
    images = ImageFolder(folder, processor, signature(model.forward).parameters)
    drawn, unreadable = images.draw(windows["samples"], windows["seed"])
    if not drawn:
        raise ValueError(f"None of the {len(images)} images in {folder} can be read. Add images.")
    warn_about_unreadable([str(path) for path in unreadable], len(drawn), reporter)
    size = windows["batch_size"]
    parts = (drawn[start : start + size] for start in range(0, len(drawn), size))
    return [collate_images([images[index] for index in part]) for part in parts]


def _is_of_one_tower(model: PreTrainedModel) -> bool:
    """Whether the command that restores can tell how the model is used."""
    try:
        find_task(type(model).__name__, model.config)
    except ValueError:
        return False
    return True


def parse_amounts(texts: Sequence[str]) -> dict[str, float | str]:
    """`["vision=0.4", "language=2:4"]` as `modality_sparsity`."""
    amounts: dict[str, float | str] = {}
    for text in texts:
        name, equals, amount = text.partition("=")
        if not (name and equals and amount):
            raise ValueError(f"--modality-sparsity is {text!r}; give NAME=AMOUNT, e.g. vision=0.4 or language=2:4.")
        try:
            amounts[name] = amount if ":" in amount else float(amount)
        except ValueError as error:
            raise ValueError(
                f"--modality-sparsity is {text!r}: {amount!r} is no fraction and no n:m pattern."
            ) from error
    return amounts


def _load(model: str, dtype: str, device_map: str, offload_folder: str) -> PreTrainedModel:
    """The model with the head that its checkpoint was saved with."""
    config = read_model_config(model)
    _check_dense(model, config)
    cls = model_class(config)
    if cls is None:
        raise ValueError(
            f"The config of {model!r} names the architectures {config.architectures}, none of which is a class of "
            "transformers. Load the model in Python and call peft_variator.sparsity.prune on it."
        )
    if device_map not in PLACEMENTS:
        find_device(device_map)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    how = {"config": config, "dtype": wanted, "device_map": device_map, "offload_folder": offload_folder}
    try:
        return load_whole(cls, model, **how)
    except ValueError:
        if "add_pooling_layer" not in signature(cls.__init__).parameters:
            raise
        return load_whole(cls, model, add_pooling_layer=False, **how)  # it may have been saved without one


def _check_dense(model: str, config: PreTrainedConfig) -> None:
    """Raise before a packed or quantized model is loaded: the zeros and values of its weights are fixed."""
    entry = pop_quantization(config.to_dict())
    if entry is None:
        return
    try:
        read_quantization(entry)
    except ValueError as error:
        raise ValueError(f"{model!r} is quantized. Prune its dense original, then quantize. {error}") from error
    raise ValueError(
        f"{model!r} is packed: its zeros are fixed. Make it dense, and prune that: peft-variator unpack "
        f"{shlex.quote(model)} --output {shlex.quote(f'{Path(model).name}-dense')}"
    )


def _load_processor(model: str, needed: bool) -> Any | None:
    """The model's tokenizer or processor, None where it has none and none is needed."""
    try:
        processor = AutoProcessor.from_pretrained(model)
        check_vocabulary(processor, model)
        return processor
    except (OSError, ValueError) as error:
        if needed:
            raise ValueError(f"{model!r} has no tokenizer or processor to read --data with: {error}") from error
        return None


def _show(
    report: SparsityReport, settings: PruneSettings, with_processor: bool, can_restore: bool, reporter: Reporter
) -> None:
    reporter.show_table(report.table("block"))
    total, names = report.total, ", ".join(row.name for row in report.grouped("modality"))
    reporter.say(
        f"Pruned {len(report.modules)} modules ({names}) with {report.source['config']['method']}: {total.zeros:,} of "
        f"{total.weights:,} weights are zero ({total.sparsity:.2%})."
    )
    if not with_processor:
        reporter.warn("The model has no tokenizer or processor, so none was saved with it.")
    commands: list[list[object]] = [["inspect", settings.output]]
    if can_restore:
        words = data_words(settings.data, settings.text_column, settings.split)
        words += ["--teacher", settings.model, "--output", f"{settings.output}-adapter"]
        commands.append(["restore", settings.output, *words])
    reporter.say(
        f"Saved to {settings.output}, with the report as {REPORT_NAME}.",
        *next_commands(*commands),
    )


def inspect(path: Path, by: str, pattern: str | None, fail: bool, reporter: Reporter) -> bool:
    """Count the zeros of a checkpoint and tell; see [`inspect_checkpoint`].

    Returns:
        Whether the checkpoint is what was asked for.

    Raises:
        ValueError: `fail` without a pattern, or no checkpoint that can be read.
    """
    reporter.check()
    if fail and pattern is None:
        raise ValueError(
            "--fail says whether every module meets a pattern: name the pattern with --pattern, e.g. 2:4."
        )
    report = inspect_checkpoint(path, pattern)
    _show_sparsity(report, by, reporter)
    reporter.write_json(report.to_json())
    if reporter.png is not None:
        report.plot(reporter.png, by)
        reporter.say(f"Wrote {reporter.png}.")
    missed = [module.name for module in report.modules if module.pattern_met is False]
    if fail and missed:
        reporter.warn(
            f"{len(missed)} of {len(report.modules)} modules miss the pattern {pattern}: {name_some(missed)}."
        )
    return not (fail and missed)


def _show_sparsity(report: SparsityReport, by: str, reporter: Reporter) -> None:
    reporter.show_table(report.table(by))
    if report.source["structure"] == "tensor names":
        reporter.warn(
            f"{report.source['reason']}, so every matrix called weight counts, embeddings too, and blocks are guessed "
            "from names."
        )
    if report.total.negative_zeros:
        reporter.warn(
            f"{report.total.negative_zeros:,} zeros are stored as -0.0, which some 2:4 kernels read as values."
        )
