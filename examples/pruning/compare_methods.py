"""Prune a causal language model by every method, and measure its loss on text it was not calibrated on.

    python examples/pruning/compare_methods.py MODEL TEXT --pattern 2:4 --json results.json

TEXT is cut into documents. Of the long enough ones the first half is for calibration (another sample for each seed),
the second half for measuring.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_variator.files import write_text
from peft_variator.sparsity import PruningConfig, prune


METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "dsnot": {"method": "dsnot"},
    "dsnot, threshold 0": {"method": "dsnot", "error_threshold": 0.0},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda, dense inputs": {"method": "wanda", "propagate": False},
    "sparsegpt, dense inputs": {"method": "sparsegpt", "propagate": False},
}


def beginnings(tokenizer: Any, text: str, separator: str, length: int) -> torch.Tensor:
    """The first `length` tokens of each document that has so many: (documents, length)."""
    documents = [tokenizer(part.strip())["input_ids"] for part in text.split(separator)]
    return torch.tensor([tokens[:length] for tokens in documents if len(tokens) >= length])


@torch.no_grad()
def loss(model: PreTrainedModel, batches: list[torch.Tensor]) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches]
    return sum(losses) / sum(map(len, batches))


def main(
    model: Annotated[str, typer.Argument(help="A causal language model with a tokenizer.")],
    text: Annotated[Path, typer.Argument(help="A text file.")],
    sparsity: Annotated[float | None, typer.Option()] = None,
    pattern: Annotated[str | None, typer.Option()] = None,
    separator: Annotated[str, typer.Option(help="What stands between documents.")] = "<|endoftext|>",
    samples: Annotated[int, typer.Option(help="Calibration documents.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens taken of a document.")] = 256,
    evaluated: Annotated[int, typer.Option(help="Documents to measure on.")] = 256,
    seeds: Annotated[int, typer.Option(help="How many samples of calibration documents.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Compare the pruning methods on one model."""
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    documents = beginnings(tokenizer, text.read_text(encoding="utf-8"), separator, length)
    first, second = documents[: len(documents) // 2], documents[len(documents) // 2 :]
    held_out = list(second[:evaluated].split(16))
    results: dict[str, Any] = {"dense": {"loss": [loss(dense, held_out)], "cpu_seconds": [0.0]}}
    for name, fields in track(METHODS.items(), "pruning", console=Console(stderr=True)):
        row = results[name] = {"loss": [], "cpu_seconds": []}
        for seed in range(seeds):
            chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:samples]
            pruned, start = copy.deepcopy(dense), time.process_time()
            batches = [{"input_ids": batch} for batch in first[chosen].split(16)]
            prune(pruned, PruningConfig(sparsity=sparsity, pattern=pattern, **fields), batches, progress=False)
            row["cpu_seconds"].append(time.process_time() - start)
            row["loss"].append(loss(pruned, held_out))
    show(results, pattern or f"{sparsity:.0%}")
    if json_file is not None:
        settings = {"pattern": pattern, "sparsity": sparsity, "samples": samples, "length": length, "seeds": seeds}
        settings |= {
            "calibration": len(first),
            "evaluated": sum(map(len, held_out)),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        settings["threads"] = torch.get_num_threads()
        write_text(json_file, json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


def show(results: dict[str, Any], amount: str) -> None:
    """Mean and spread over the seeds."""
    table = Table("method", "loss", "lowest", "highest", "above dense", "CPU seconds", title=f"Pruned to {amount}")
    for name, row in results.items():
        mean, above = statistics.mean(row["loss"]), statistics.mean(row["loss"]) - results["dense"]["loss"][0]
        figures = (f"{mean:.3f}", f"{min(row['loss']):.3f}", f"{max(row['loss']):.3f}", f"{above:+.3f}")
        table.add_row(name, *figures, f"{statistics.mean(row['cpu_seconds']):.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
