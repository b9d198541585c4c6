"""Prune the trained LLaVA in many ways and restore it: one JSON a run; runs that are done are skipped.

python examples/vlm_restore/train_base.py --data DATA/easy_vqa
python examples/vlm_restore/study.py --data DATA/easy_vqa
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from plan import Run, plan
from rich.console import Console
from runs import Study

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


WORK = Path("outputs/vlm_restore")
RESULTS = Path(__file__).parent / "results"
console = Console(soft_wrap=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder of easy-VQA.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of a restoration.")] = 200,
    limit: Annotated[int | None, typer.Option(help="Stop after so many runs.")] = None,
    work: Annotated[Path, typer.Option(help="Where train_base.py put the model.")] = WORK,
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
) -> None:
    """Run what is not there yet, the main rows first."""
    if not (work / "base" / "config.json").is_file():
        raise typer.BadParameter(f"There is no trained model in {work / 'base'}. Run train_base.py first.")
    missing = [run for run in plan() if not _file(results, run).is_file()]
    console.print(f"{len(missing)} runs of {len(plan())} are to be done.")
    study = Study(data, work / "base", steps)
    for run in missing[:limit]:
        start = time.process_time()
        found = study.run(run)
        record = {
            **run.to_dict(),
            **found,
            "cpu_seconds": time.process_time() - start,
            "environment": describe_environment(torch.device("cpu")),
        }
        write_text(_file(results, run), json.dumps(record, indent=2) + "\n")
        console.print(f"{run.name}: {found['accuracy']:.2%}, {found['sparsity']:.2%} zeros")
    console.print("Next: python examples/vlm_restore/render.py")


def _file(results: Path, run: Run) -> Path:
    return results / f"study-{run.name}.json"


if __name__ == "__main__":
    typer.run(main)
