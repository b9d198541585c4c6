"""Restore a pruned language model and a pruned encoder: one JSON a run; runs that are done are skipped.

python examples/restore/run.py --data DATA
python examples/restore/run.py --data DATA --only language --seed 0 --seed 1
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from encoder import AMOUNTS, Encoder
from language import METHODS, LanguageModel
from rich.console import Console
from training import VARIANTS

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


RESULTS = Path(__file__).parent / "results"
console = Console(soft_wrap=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds a folder a data set.")],
    only: Annotated[Literal["language", "encoder"] | None, typer.Option(help="Both if left out.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; 0 if left out.")] = None,
    language_steps: Annotated[int, typer.Option(help="Optimizer steps for the language model.")] = 300,
    encoder_steps: Annotated[int, typer.Option(help="Optimizer steps for the encoder.")] = 200,
    evaluated: Annotated[int, typer.Option(help="Windows of 256 tokens to measure the language model on.")] = 512,
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
) -> None:
    """Run what is not there yet."""
    subjects: dict[str, tuple[Any, list[str], list[str]]] = {}
    if only != "encoder":
        variants = ["dense", "pruned", *VARIANTS]
        subjects["language"] = LanguageModel(data, language_steps, evaluated), list(METHODS), variants
    if only != "language":
        variants = ["dense", "pruned", "sparse-lora-distilled"]
        subjects["encoder"] = Encoder(data, encoder_steps), list(AMOUNTS), variants
    for name, (subject, settings, variants) in subjects.items():
        for number in seed or [0]:
            for setting in settings:
                for variant in variants:
                    slug = setting.replace(":", "-").replace("%", "-percent")
                    _run(
                        subject, name, setting, variant, number, results / f"{name}-{slug}-{variant}-seed{number}.json"
                    )
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
