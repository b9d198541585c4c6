"""`peft-variator prune`: a dense model in, a sparse model out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..files import check_new_folder, new_folder
from ..models import check_model_name, load_whole, model_class
from ..sparsity import PruningConfig, SparsityReport, prune
from ..sparsity.calibration import read_batches
from .console import open_console
from .errors import reported


__all__ = ["REPORT_NAME", "prune_command"]

REPORT_NAME = "sparsity_report.json"


def prune_command(
    model: Annotated[str, typer.Argument(help="Hub name or folder of the dense model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the pruned model.")],
    method: Annotated[Literal["magnitude", "wanda", "sparsegpt", "dsnot"], typer.Option(help="How.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Fraction of weights removed, in [0, 1).")] = None,
    pattern: Annotated[str | None, typer.Option(help="n:m pattern, n weights kept of every m: 2:4, 4:8.")] = None,
    modality_sparsity: Annotated[
        list[str] | None,
        typer.Option(help="How much of one modality, e.g. vision=0.4 or language=2:4; repeat for more of them."),
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="Prune only this modality with --sparsity or --pattern; may be repeated.")
    ] = None,
    allocation: Annotated[
        Literal["uniform", "ecoflap"], typer.Option(help="ecoflap: less where the loss depends on the block more.")
    ] = "uniform",
    score_order: Annotated[
        Literal["zeroth", "first"], typer.Option(help="ecoflap: from loss differences or from gradients.")
    ] = "zeroth",
    target_module: Annotated[list[str] | None, typer.Option(help="Module to prune, by the end of its name.")] = None,
    exclude_module: Annotated[list[str] | None, typer.Option(help="Module to leave dense, likewise.")] = None,
    data: Annotated[
        Path | None, typer.Option(help='Calibration: plain text, or .jsonl with {"text": ..., "image": path} a line.')
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text, or records, to calibrate on.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a batch.")] = 8,
    propagate: Annotated[
        bool, typer.Option(help="Calibrate each block on what the pruned blocks before it give, or on the dense ones.")
    ] = True,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the checkpoint is stored.")
    ] = "auto",
    device_map: Annotated[str, typer.Option(help="Where the model goes: auto, cpu, cuda:0; auto offloads.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the windows and of ecoflap's noise.")] = 0,
) -> None:
    """Prune MODEL and save it with a report of its zeros. The output folder appears when all of it is written."""
    with reported():
        check_new_folder(output)
        config = PruningConfig(
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            modality_sparsity=_amounts(modality_sparsity or []) or None,
            modalities=modality,
            allocation="modality" if modality_sparsity and allocation == "uniform" else allocation,
            score_order=score_order,
            target_modules=target_module,
            exclude_modules=exclude_module,
            propagate=propagate,
            seed=seed,
        )
        if data is None and (method != "magnitude" or allocation == "ecoflap"):
            raise ValueError(f"method={method!r} with allocation={allocation!r} needs calibration data: give --data.")
        with tempfile.TemporaryDirectory(prefix="peft-variator-offload-") as offload_folder:
            loaded = _load(model, dtype, device_map, offload_folder)
            processor = _load_processor(model, needed=data is not None)
            settings = {"samples": samples, "length": length, "batch_size": batch_size, "seed": seed}
            # An encoder–decoder makes its decoder's inputs of them.
            labels = loaded.can_generate() and (allocation == "ecoflap" or loaded.config.is_encoder_decoder)
            batches = None if data is None else read_batches(data, processor, labels=labels, **settings)
            report = prune(loaded, config, batches)
            report.source.update(model=model, data=None if data is None else str(data), **settings)
            with new_folder(output) as folder:
                loaded.save_pretrained(folder)
                if processor is not None:
                    processor.save_pretrained(folder)
                report.save_json(folder / REPORT_NAME)
        _show(report, output, processor is not None)


def _amounts(texts: list[str]) -> dict[str, float | str]:
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
    check_model_name(model)
    config = AutoConfig.from_pretrained(model)
    cls = model_class(config)
    if cls is None:
        raise ValueError(
            f"The config of {model!r} names the architectures {config.architectures}, none of which is a class of "
            "transformers. Load the model in Python and call peft_variator.sparsity.prune on it."
        )
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    return load_whole(cls, model, dtype=wanted, device_map=device_map, offload_folder=offload_folder)


def _load_processor(model: str, needed: bool) -> Any | None:
    """The model's tokenizer or processor, None where it has none and none is needed."""
    try:
        return AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        if needed:
            raise ValueError(f"{model!r} has no tokenizer or processor to read --data with: {error}") from error
        return None


def _show(report: SparsityReport, output: Path, with_processor: bool) -> None:
    console = open_console(120)
    console.print(report.table("block"))
    total, names = report.total, ", ".join(row.name for row in report.grouped("modality"))
    console.print(
        f"Pruned {len(report.modules)} modules ({names}) with {report.source['config']['method']}: {total.zeros:,} of "
        f"{total.weights:,} weights are zero ({total.sparsity:.2%}).",
        highlight=False,
    )
    if not with_processor:
        console.print("[yellow]The model has no tokenizer or processor, so none was saved with it.[/]")
    console.print(f"Saved to {output}, with the report as {REPORT_NAME}.", highlight=False, markup=False)
    console.print(
        f"Next: peft-variator inspect {output}, or win quality back: peft-variator restore {output} --data TEXT "
        "--teacher MODEL --output DIR.",
        highlight=False,
        markup=False,
    )
