"""`peft-variator restore`: a pruned model and text in, a SparseLoRA adapter with its model card out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models import Task
from ..training.restored_card import RestoredFacts
from .console import show_result
from .errors import reported
from .restore_job import RestoreJob


__all__ = ["restore_command"]


def restore_command(
    model: Annotated[str, typer.Argument(help="Pruned model; or the dense one of an --adapter that stores masks.")],
    data: Annotated[
        str, typer.Option(help="Text file, .jsonl, data set on the Hub; for vision models a folder of images.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make for the adapter.")],
    teacher: Annotated[
        str | None, typer.Option(help="The dense model. Not with stored masks, where MODEL itself is dense.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="SparseLoRA adapter to start from instead of a new one.")] = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="λ of (1 − λ)·task + λ·KL to the dense model (0.1; 0 without one).")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of a new adapter.")] = 8,
    alpha: Annotated[float, typer.Option(help="Its update is scaled by alpha / rank.")] = 16.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch, on each process.")] = 16,
    accumulation: Annotated[int, typer.Option(help="Batches in an optimizer step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate; it warms up and follows a cosine to 0.")] = 1e-3,
    max_length: Annotated[int, typer.Option(help="Most tokens in an example; lengths vary from a quarter up.")] = 128,
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
    """Restore a pruned MODEL with SparseLoRA, and write the adapter with a model card. Merged, it stays as sparse.

    Language models learn the text and follow the dense model's predictions; encoders and vision models follow its
    hidden states. Only pruned layers are adapted. Vision-language models: use DistillationTrainer in Python.
    """
    with reported():
        job = RestoreJob(
            model=model,
            data=data,
            output=output,
            teacher=teacher,
            adapter=adapter,
            kl_weight=kl_weight,
            rank=rank,
            alpha=alpha,
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            lr=lr,
            max_length=max_length,
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


def _show(job: RestoreJob, facts: RestoredFacts) -> None:
    lines = [
        f"Adapted {facts.modules} modules, {facts.masked:.2%} of whose weights are masked, "
        + ("following no dense model." if facts.teacher is None else f"following the dense model {facts.teacher}."),
        f"Wrote {job.output}: the adapter ({facts.parameters:,} parameters), its model card README.md, and "
        "training.json with the losses.",
        "Next: merge it, which keeps every zero, and check that with peft-variator inspect restored:",
        *("  " + line for line in facts.usage.splitlines() if line),
    ]
    show_result(f"{facts.base} on {facts.held_out} held-out examples", facts.rows(), lines)
