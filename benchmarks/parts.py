"""Where the time of a call goes: feed-forward networks, the plugin itself, everything else.

    python benchmarks/parts.py                    # all cases, on 2 threads
    python benchmarks/parts.py bert-base-8x128    # one case

Writes `benchmarks/results/parts/CASE.json`; `python benchmarks/render.py` puts them into docs/benchmark.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from peft_variator import VariatorConfig
from peft_variator.files import write_text
from peft_variator.profiling import (
    BenchmarkSettings,
    build_model,
    count_flops,
    describe_environment,
    load_config,
    make_inputs,
    make_lengths,
    num_threads,
    share_weights,
)
from peft_variator.tuners.variator.layer import PluginModule


__all__ = ["CASES", "main", "measure"]

RESULTS = Path(__file__).resolve().parent / "results" / "parts"
CASES = {
    "bert-base-8x128": BenchmarkSettings("bert-base", [4], batch=8, length=128, rounds=15),
    "qwen2.5-0.5b-1x512": BenchmarkSettings("qwen2.5-0.5b", [4], batch=1, length=512, rounds=15),
    "qwen2.5-0.5b-4x512-uneven": BenchmarkSettings("qwen2.5-0.5b", [4], 4, 512, "uneven", rounds=8),
    "t5-base-encoder-8x128-uneven": BenchmarkSettings("t5-base-encoder", [4], 8, 128, "uneven", rounds=15),
    "minilm-l6-32x128-uneven": BenchmarkSettings("minilm-l6", [4], 32, 128, "uneven", rounds=15),
}


@dataclass
class Stopwatch:
    """Seconds spent in some modules, and the vectors that went into them."""

    seconds: float = 0.0
    vectors: int = 0

    @contextmanager
    def on(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Let it run while one of the modules does; they must not contain each other."""
        handles = [
            handle
            for module in modules
            for handle in (
                module.register_forward_pre_hook(self._start),
                module.register_forward_hook(self._stop),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.vectors += inputs[0][..., 0].numel()
        self.seconds -= time.perf_counter()

    def _stop(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self.seconds += time.perf_counter()


def measure(
    base: nn.Module, plugin: PeftModel, inputs: dict[str, Any], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds of the parts of a call, a dict a round, of the base and of the model with the plugin, in turn."""
    parts = plugin.get_base_model().named_modules()
    wrappers = {name: part for name, part in parts if isinstance(part, PluginModule)}
    found: dict[str, list[dict[str, float]]] = {"base": [], "plugin": []}
    for number in track(range(rounds + 2), "measuring", console=Console(stderr=True)):
        for name in ("base", "plugin") if number % 2 else ("plugin", "base"):
            if name == "base":
                call = _one_call(base, inputs, [base.get_submodule(path) for path in wrappers], [])
            else:
                networks = [wrapper.base_layer for wrapper in wrappers.values()]
                call = _one_call(plugin, inputs, networks, list(wrappers.values()))
            if number >= 2:  # the first two warm up
                found[name].append(call)
    return found


def _one_call(
    model: nn.Module, inputs: dict[str, Any], networks: list[nn.Module], wrappers: list[nn.Module]
) -> dict[str, float]:
    inside, around = Stopwatch(), Stopwatch()
    with inside.on(networks), around.on(wrappers):
        start = time.perf_counter()
        model(**inputs)
        total = time.perf_counter() - start
    own = around.seconds - inside.seconds if wrappers else 0.0
    return {
        "total": total,
        "networks": inside.seconds,
        "plugin": own,
        "rest": total - inside.seconds - own,
        "vectors": inside.vectors,
    }


def run(settings: BenchmarkSettings) -> dict[str, Any]:
    """Build the models of a case and measure them."""
    config, device = load_config(settings.model), torch.device("cpu")
    settings = settings.resolved(config)
    assert settings.task is not None
    assert settings.length is not None  # it is text
    generator = torch.Generator().manual_seed(settings.seed)
    lengths = make_lengths(settings.batch, settings.length, settings.lengths, generator)
    inputs = make_inputs(config, settings.task, lengths, dtype=torch.float32, generator=generator)
    torch.manual_seed(settings.seed)
    base = build_model(settings.model, config, settings.task, dtype=torch.float32, device=device, random_weights=True)
    plugin = get_peft_model(share_weights(base), VariatorConfig(init_weights=False, decompression="bottleneck")).eval()
    plugin.set_compression_ratio(settings.ratios[0])
    with torch.no_grad():
        return {
            "model": settings.model,
            "batch": settings.batch,
            "length": settings.length,
            "lengths": settings.lengths,
            "ratio": settings.ratios[0],
            "environment": describe_environment(device),
            "flops": {"base": count_flops(base, inputs), "plugin": count_flops(plugin, inputs)},
            "rounds": measure(base, plugin, inputs, settings.rounds),
        }


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(CASES)}; all if left out.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
) -> None:
    """Measure the cases one after the other."""
    for name in names or CASES:
        if name not in CASES:
            raise typer.BadParameter(f"There is no case {name!r}. Choose from: {', '.join(CASES)}.")
    for name in names or CASES:
        with num_threads(threads):
            found = {"command": f"python benchmarks/parts.py {name} --threads {threads}", **run(CASES[name])}
        file = RESULTS / f"{name}.json"
        write_text(file, json.dumps(found, indent=2) + "\n")
        typer.echo(f"{file} is written. Next: python benchmarks/render.py")


if __name__ == "__main__":
    typer.run(main)
