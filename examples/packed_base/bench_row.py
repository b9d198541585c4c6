"""One row of the benchmark, in a process of its own: loads a model, runs it, trains a step, writes time and memory.

bench.py starts it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from peak import PeakMemory
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_variator import SparseLoraConfig, load_base
from peft_variator.files import write_text
from peft_variator.profiling import (
    Candidate,
    make_inputs,
    make_lengths,
    make_training_step,
    num_threads,
    time_alternately,
)


CPU, PAGE = torch.device("cpu"), 4096
ADAPTERS: dict[str, Callable[[int], Any]] = {
    "lora": lambda rank: LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"),
    "sparse-lora": lambda rank: SparseLoraConfig(r=rank, lora_alpha=rank),
}
Figures = dict[str, float]


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Args:
        samples: timed samples of each figure.
        min_seconds: seconds that a sample takes at least.
    """

    samples: int
    min_seconds: float


@contextmanager
def watched(figures: Figures, name: str) -> Iterator[None]:
    """Add the peak of memory, less what the process held before it loaded anything."""
    with PeakMemory() as peak:
        yield
    figures[f"{name}_anonymous"] = peak.anonymous - figures["before_anonymous"]
    figures[f"{name}_resident"] = peak.resident - figures["before_resident"]


def import_model(folder: Path) -> None:
    """Import the code of a model, and collect what that left, so that it is not what is measured."""
    config = AutoConfig.from_pretrained(folder)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    gc.collect()  # else it depends on luck which load has to


def set_page_cache(folder: Path, keep: bool) -> None:
    """Bring the files of a folder into the system's cache, or have it drop them."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            if not keep:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while keep and handle.read(1 << 20):
                pass


def load(folder: Path, unpacked: str | None, figures: Figures, prefix: str = "") -> PreTrainedModel:
    """Load, and go on until every page of the weights has been read."""
    with PeakMemory() as before:
        pass
    figures["before_anonymous"], figures["before_resident"] = before.anonymous, before.resident
    start = time.perf_counter()
    with watched(figures, f"{prefix}load"):
        if unpacked is None:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        else:
            model = load_base(folder, unpacked=unpacked)
        figures[f"{prefix}load_seconds"] = time.perf_counter() - start
        read_weights(model)
    figures[f"{prefix}read_seconds"] = time.perf_counter() - start
    return model


def read_weights(model: nn.Module) -> None:
    """Touch every page of the weights: transformers maps files, and reads what needs no change at its first use."""
    for weight in model.parameters():
        weight.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()


def timed(run: Callable[[], object], name: str, effort: Effort, figures: Figures) -> None:
    """Add the peak of memory of one call, and then seconds, the median of several samples that nothing watches."""
    with watched(figures, name):
        run()
    seconds = time_alternately([Candidate(name, run)], effort.samples, device=CPU, min_seconds=effort.min_seconds)
    figures[f"{name}_seconds"] = statistics.median(seconds[name])


def run_forwards(model: nn.Module, inputs: dict[str, Any], effort: Effort, figures: Figures) -> None:
    """A prefill, and one token after it."""
    with torch.inference_mode():
        timed(lambda: model(**inputs), "prefill", effort, figures)
        cache = model(**inputs).past_key_values
        token = inputs["input_ids"][:, :1]

        def next_token() -> None:
            model(input_ids=token, past_key_values=cache, use_cache=True)
            cache.crop(-1)

        timed(next_token, "token", effort, figures)


def run_training(model: nn.Module, inputs: dict[str, Any], effort: Effort, figures: Figures) -> None:
    """Next-token loss, its backward, an AdamW step on the adapter."""
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    step = make_training_step(model, lambda trained: trained(**batch, labels=batch["input_ids"], use_cache=False).loss)
    timed(step, "step", effort, figures)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the model.")],
    output: Annotated[Path, typer.Argument(help="JSON file to write.")],
    unpacked: Annotated[Literal["forward", "always"] | None, typer.Option(help="Left out: a dense model.")] = None,
    adapter: Annotated[Literal["lora", "sparse-lora"] | None, typer.Option(help="What is trained.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the prefill and of the step.")] = 512,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 8,
    samples: Annotated[int, typer.Option(help="Timed samples of each, at least 2.")] = 3,
    min_seconds: Annotated[float, typer.Option(help="Short calls are repeated to fill a sample of so many.")] = 0.2,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Load from files out of the cache, and do no more.")] = False,
    unchanged: Annotated[bool, typer.Option("--unchanged", help="Load files checked before, and do no more.")] = False,
) -> None:
    """Measure one row."""
    figures: Figures = {}
    import_model(folder)
    set_page_cache(folder, keep=not cold)
    with num_threads(threads):
        if cold or unchanged:
            load(folder, unpacked, figures, prefix="cold_" if cold else "unchanged_")
        else:
            run(folder, unpacked, adapter, length, rank, Effort(samples, min_seconds), figures)
    write_text(output, json.dumps(figures))


def run(
    folder: Path, unpacked: str | None, adapter: str | None, length: int, rank: int, effort: Effort, figures: Figures
) -> None:
    """Load from files in the cache, run the model, and train its adapter."""
    model: nn.Module = load(folder, unpacked, figures)
    generator = torch.Generator().manual_seed(0)
    lengths = make_lengths(1, length, "even", generator)
    inputs = make_inputs(model.config, "causal", lengths, dtype=torch.float32, generator=generator)
    if adapter is not None:
        model = get_peft_model(model, ADAPTERS[adapter](rank)).eval()
    run_forwards(model, inputs, effort, figures)
    if adapter is not None:
        run_training(model, inputs, effort, figures)


if __name__ == "__main__":
    typer.run(main)
