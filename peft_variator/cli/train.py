"""`peft-variator train`: a model and text or images in, a compression plugin with its model card out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..models import Task
from ..training.card import PluginFacts
from .console import show_result
from .errors import reported
from .ratios import parse_ratios
from .train_job import TrainJob


__all__ = ["train_command"]


def train_command(
    model: Annotated[str, typer.Argument(help="Hub name or folder of the base model.")],
    data: Annotated[
        str,
        typer.Option(help="Text file, .jsonl, data set on the Hub; for vision models a folder of images."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the plugin.")],
    ratio: Annotated[
        list[int] | None,
        typer.Option(help="Compression ratio k (4); may be repeated: one plugin is trained for all of them."),
    ] = None,
    ratios: Annotated[str | None, typer.Option(help="The same with commas: --ratios 2,4,8.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Plugin to start from instead of a new one.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch, on each process.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Batches in an optimizer step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate; it warms up and follows a cosine to 0.")] = 2e-3,
    max_length: Annotated[int, typer.Option(help="Most tokens in an example; lengths vary from a quarter up.")] = 128,
    hidden_loss: Annotated[
        Literal["all", "last"], typer.Option(help="Hidden states to follow: of all layers, or the last.")
    ] = "all",
    logits_weight: Annotated[
        float | None, typer.Option(help="Weight of the KL of predictions beside that of hidden states, which is 1.")
    ] = None,
    bottleneck_dim: Annotated[int | None, typer.Option(help="Width of the decompressor of a new plugin (64).")] = None,
    held_out: Annotated[int, typer.Option(help="Examples to measure on; at most a tenth of the data.")] = 128,
    text_column: Annotated[str, typer.Option(help="Column of a data set or .jsonl that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    task: Annotated[Task | None, typer.Option(help="Left out: read off the architecture.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Save ten checkpoints here, and go on from the last one that is found.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train a Variator plugin for MODEL on plain text or images, and write it with a model card.

    The plugin learns to give what the model gives without it, so the data needs no labels. Language models read the
    first part of each text and predict the rest. Quality is measured on held-out data before and after.

    On several processes: accelerate launch -m peft_variator.cli.main train MODEL ...
    """
    with reported():
        job = TrainJob(
            model=model,
            data=data,
            output=output,
            ratio=_ratios(ratio or [], ratios),
            adapter=adapter,
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            lr=lr,
            max_length=max_length,
            hidden_loss=hidden_loss,
            logits_weight=logits_weight,
            bottleneck_dim=bottleneck_dim,
            held_out=held_out,
            text_column=text_column,
            split=split,
            task=task,
            bf16=bf16,
            checkpoints=checkpoints,
            seed=seed,
        )
        facts, is_first = job.run()
        if is_first:
            _show(job, facts)


def _ratios(repeated: list[int], listed: str | None) -> list[int] | None:
    ratios = list(dict.fromkeys([*repeated, *([] if listed is None else parse_ratios(listed))]))
    for ratio in ratios:
        if ratio < 2:
            raise ValueError(f"The ratio {ratio} compresses nothing, so there is nothing to train. Use 2 or more.")
    return ratios or None


def _show(job: TrainJob, facts: PluginFacts) -> None:
    size = (job.output / "adapter_model.safetensors").stat().st_size / 1e6
    lines = [
        f"Wrote {job.output}: the plugin ({facts.parameters:,} parameters, {size:.2f} MB), its model card README.md, "
        "and training.json with the losses.",
        "Next:",
        f"  how to load it:       {job.output / 'README.md'}",
        "  how fast it is:       " + shlex.join(["peft-variator", "bench", facts.base, "--ratios", _listed(facts)]),
        "  adapt it to a task:   "
        + shlex.join(["peft-variator", "train", facts.base, "--adapter", str(job.output)])
        + " --data TEXT_OF_THE_TASK --output DIR",
    ]
    show_result(f"Fidelity to {facts.base} on {facts.held_out} held-out examples", facts.rows(), lines)


def _listed(facts: PluginFacts) -> str:
    return ",".join(str(each.ratio) for each in facts.ratios)
