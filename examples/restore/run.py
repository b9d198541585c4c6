"""Restore pruned language models and a pruned encoder: one JSON a run; runs that are done are skipped.

python examples/restore/run.py --data DATA
python examples/restore/run.py --data DATA --only language --seed 0 --seed 1
python examples/restore/run.py --data DATA --only smollm2 --cache CACHE --work WORK
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from encoder import AMOUNTS, Encoder
from language import METHODS, LanguageModel, SmolLM2
from rich.console import Console
from training import VARIANTS

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


RESULTS = Path(__file__).parent / "results"
console = Console(soft_wrap=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds a folder a data set.")],
    only: Annotated[
        Literal["language", "encoder", "smollm2"] | None, typer.Option(help="The first two if left out.")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Rows; all if left out.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="Ways of pruning; all if left out.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; 0 if left out.")] = None,
    language_steps: Annotated[int, typer.Option(help="Optimizer steps for the language model.")] = 300,
    encoder_steps: Annotated[int, typer.Option(help="Optimizer steps for the encoder.")] = 200,
    evaluated: Annotated[int, typer.Option(help="Windows of 256 tokens to measure the language model on.")] = 512,
    smollm2_steps: Annotated[int, typer.Option(help="Optimizer steps for SmolLM2.")] = 120,
    smollm2_evaluated: Annotated[int, typer.Option(help="Windows of 128 tokens to measure SmolLM2 on.")] = 96,
    cache: Annotated[Path | None, typer.Option(help="Folder of SmolLM2, see examples/real_models.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for SmolLM2's checkpoints: runs go on.")] = None,
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
) -> None:
    """Run what is not there yet."""
    subjects: dict[str, tuple[Any, list[str], list[str]]] = {}
    if only in (None, "language"):
        variants = ["dense", "pruned", *VARIANTS]
        subjects["language"] = LanguageModel(data, language_steps, evaluated), list(METHODS), variants
    if only in (None, "encoder"):
        variants = ["dense", "pruned", "sparse-lora-distilled"]
        subjects["encoder"] = Encoder(data, encoder_steps), list(AMOUNTS), variants
    if only == "smollm2":
        if cache is None or work is None:
            raise typer.BadParameter("--only smollm2 needs --cache and --work.")
        smollm2 = SmolLM2(data, smollm2_steps, smollm2_evaluated, work, cache)
        # Magnitude is measured, not restored.
        subjects["smollm2"] = smollm2, ["sparsegpt", "wanda", "magnitude"], ["dense", "pruned", *VARIANTS]
    for name, (subject, settings, variants) in subjects.items():
        for number in seed or [0]:
            for chosen in settings if setting is None else setting:
                for row in variants if variant is None else variant:
                    if chosen == "magnitude" and row != "pruned":
                        continue
                    slug = chosen.replace(":", "-").replace("%", "-percent")
                    _run(subject, name, chosen, row, number, results / f"{name}-{slug}-{row}-seed{number}.json")
    console.print("Next: python examples/restore/render.py")


def _run(subject: Any, name: str, setting: str, variant: str, seed: int, file: Path) -> None:
    if file.is_file():
        console.print(f"{file} is there, skipped")
        return
    start = time.process_time()
    found = subject.run(setting, variant, seed)
    record = {
        "subject": name,
        "setting": setting,
        "variant": variant,
        "seed": seed,
        **found,
        "cpu_seconds": time.process_time() - start,
        "environment": describe_environment(torch.device("cpu")),
    }
    write_text(file, json.dumps(record, indent=2) + "\n")
    quality = found.get("loss", found.get("score"))
    console.print(f"{name} {setting} {variant} seed {seed}: {quality:.4f}, {found['sparsity']:.2%} zeros → {file}")


if __name__ == "__main__":
    typer.run(main)
