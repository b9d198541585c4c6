"""Is a checkout slower than another? A plugin's call, and a training step of both methods, in each of the two.

    python benchmarks/before_after.py --before ../old --after . --output benchmarks/results/checkouts/before_after.json

Each run is a fresh process that imports the package from one of the checkouts; the two take turns, and every second
pair the other way round. What is measured is pinned, so that a default that changed in between changes nothing: the
paper's bottleneck, 64 wide, at k = 4. The file has the ratio after ÷ before of each pair of runs, their median and
their spread.

Leave the machine alone while it runs: a busy machine measures itself.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


__all__ = ["CASES", "compare", "main", "measure"]

# Widths of the shapes, and batch × length of what they are given.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 32, "layers": 2, "heads": 2, "inner": 64, "encoder": (2, 16), "decoder": (1, 32)},
    "base": {"hidden": 768, "layers": 12, "heads": 12, "inner": 3072, "encoder": (8, 128), "decoder": (1, 512)},
}
PLUGIN = {"bottleneck_dim": 64, "compression_ratio": 4, "init_weights": False}
VOCABULARY = 30_000
SPARSITY = 0.5
WARM_UP = 2


def _encoder(size: dict[str, Any], head: bool) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        intermediate_size=size["inner"],
    )
    return BertForSequenceClassification(config) if head else BertModel(config)


def _decoder(size: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        intermediate_size=size["inner"],
    )
    return LlamaForCausalLM(config)


def _tokens(shape: tuple[int, int]) -> Any:
    import torch

    return torch.randint(10, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def _seconds_of_calls(model: Any, inputs: dict[str, Any], rounds: int) -> list[float]:
    import torch

    found = []
    with torch.inference_mode():
        for _ in range(WARM_UP + rounds):
            start = time.perf_counter()
            model(**inputs)
            found.append(time.perf_counter() - start)
    return found[WARM_UP:]


def _seconds_of_steps(model: Any, shape: tuple[int, int], rounds: int, **weights: float) -> list[float]:
    """Seconds of the trainer's steps, with everything that belongs to one."""
    from transformers import TrainerCallback

    from peft_variator import DistillationConfig, DistillationTrainer

    class Clock(TrainerCallback):
        starts: list[float] = []
        ends: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.starts.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    rows = _tokens((shape[0] * (WARM_UP + rounds), shape[1]))
    labels = {"labels": 1} if weights.get("task_weight") else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationConfig(
            output_dir=folder,
            max_steps=WARM_UP + rounds,
            per_device_train_batch_size=shape[0],
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            **weights,
        )
        data = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} | labels for row in rows]
        clock = Clock()
        DistillationTrainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    return [end - start for start, end in zip(clock.starts, clock.ends, strict=True)][WARM_UP:]


def _plugin_call(size: dict[str, Any], rounds: int, model: Any, shape: tuple[int, int]) -> list[float]:
    from peft import get_peft_model

    from peft_variator import VariatorConfig

    plugin = get_peft_model(model, VariatorConfig(**PLUGIN)).eval()
    ids = _tokens(shape)
    return _seconds_of_calls(plugin, {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}, rounds)


def _plugin_step(size: dict[str, Any], rounds: int) -> list[float]:
    from peft import get_peft_model

    from peft_variator import VariatorConfig

    plugin = get_peft_model(_encoder(size, head=False), VariatorConfig(**PLUGIN))
    return _seconds_of_steps(plugin, size["encoder"], rounds, hidden_weight=1.0)


def _sparse_lora_step(size: dict[str, Any], rounds: int) -> list[float]:
    import torch
    from peft import get_peft_model

    from peft_variator import SparseLoraConfig

    base = _encoder(size, head=True)
    with torch.no_grad():
        for module in base.bert.encoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[torch.rand(module.weight.shape) < SPARSITY] = 0
    adapted = get_peft_model(base, SparseLoraConfig(r=8, lora_alpha=16))
    return _seconds_of_steps(adapted, size["encoder"], rounds, hidden_weight=0.0, task_weight=1.0)


CASES: dict[str, Callable[[dict[str, Any], int], list[float]]] = {
    "plugin call, encoder": lambda size, rounds: _plugin_call(size, rounds, _encoder(size, False), size["encoder"]),
    "plugin call, decoder": lambda size, rounds: _plugin_call(size, rounds, _decoder(size), size["decoder"]),
    "plugin training step": _plugin_step,
    "SparseLoRA training step": _sparse_lora_step,
}


def measure(checkout: Path, size: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of every case in this process, which has imported the package from `checkout`.

    Raises:
        RuntimeError: another package is imported.
    """
    import torch

    import peft_variator

    found = Path(peft_variator.__file__).resolve()
    if not found.is_relative_to(checkout):
        raise RuntimeError(f"peft_variator is imported from {found}, not from {checkout}.")
    torch.set_num_threads(threads)
    seconds = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        seconds[name] = case(SIZES[size], rounds)
    return seconds


def _run(checkout: Path, size: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """The same in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "seconds.json")
        words = [sys.executable, __file__, "--before", checkout, "--after", checkout, "--output", file, "--worker"]
        words += ["--size", size, "--rounds", rounds, "--threads", threads]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [str(word) for word in words], check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL
        )
        return json.loads(file.read_text(encoding="utf-8"))


def compare(before: list[dict[str, list[float]]], after: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """For each case the ratio after ÷ before of the medians of each pair of runs, their median, least and largest."""
    ratios = {
        name: [
            statistics.median(new[name]) / statistics.median(old[name]) for old, new in zip(before, after, strict=True)
        ]
        for name in before[0]
    }
    return {
        name: {"median": statistics.median(found), "low": min(found), "high": max(found), "of_runs": found}
        for name, found in ratios.items()
    }


def _commit(checkout: Path) -> str:
    """The commit of a checkout, and whether files in it differ."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", "-C", str(checkout), *words], text=True).strip()

    return git("rev-parse", "HEAD") + (" and changes" if git("status", "--porcelain", "peft_variator") else "")


def _turns(runs: int) -> Iterator[Literal["before", "after"]]:
    for number in range(runs):
        yield from ("after", "before") if number % 2 else ("before", "after")


def main(
    before: Annotated[Path, typer.Option(help="Checkout to compare with.")],
    after: Annotated[Path, typer.Option(help="Checkout that is compared.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    runs: Annotated[int, typer.Option(min=1, help="Processes for each checkout.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each case in a process.")] = 10,
    size: Annotated[Literal["tiny", "base"], typer.Option(help="tiny: to try whether it runs.")] = "base",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 2,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Measure both checkouts in turn, and write one file with the ratios."""
    if worker:
        output.write_text(json.dumps(measure(after, size, rounds, threads)), encoding="utf-8")
        return
    import torch

    from peft_variator.files import check_new_file, write_text
    from peft_variator.profiling import describe_environment, was_busy

    check_new_file(output)
    checkouts = {"before": before.resolve(), "after": after.resolve()}
    found: dict[str, list[dict[str, list[float]]]] = {"before": [], "after": []}
    environments = []
    for number, name in enumerate(_turns(runs), start=1):
        environments.append(describe_environment(torch.device("cpu")))
        busy = " (the machine is busy: these figures are not to be trusted)" if was_busy(environments[-1]) else ""
        typer.echo(f"[{number}/{2 * runs}] {name}{busy}")
        found[name].append(_run(checkouts[name], size, rounds, threads))
    ratios = compare(found["before"], found["after"])
    report = {
        "command": f"python benchmarks/before_after.py --before BEFORE --after AFTER --output {output.name} "
        f"--runs {runs} --rounds {rounds} --size {size} --threads {threads}",
        "commits": {name: _commit(path) for name, path in checkouts.items()},
        "shapes": SIZES[size],
        "plugin": PLUGIN,
        "environment": environments[0],
        "cpu_in_use": [each["cpu_in_use"] for each in environments],
        "ratios": ratios,
        "seconds": found,
    }
    write_text(output, json.dumps(report, indent=2) + "\n")
    for name, ratio in ratios.items():
        typer.echo(f"{name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) of the time before")
    typer.echo(f"{output} is written.")


if __name__ == "__main__":
    typer.run(main)
