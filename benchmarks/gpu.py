"""Everything that only a GPU can tell, in one command: is it right, does it pay, what does it hold.

    python benchmarks/gpu.py                  # all stages on the first CUDA device, a few minutes
    python benchmarks/gpu.py plugin two-four  # some of them
    python benchmarks/gpu.py --dry            # tiny shapes on the CPU: does every stage run

It needs no network, and runs with the torch, transformers and peft that are there. Each stage is a process of its own,
the most telling first; its JSON is written anew after every row, so that what breaks a stage, or the time that is up,
takes nothing away of what was measured before. A row that fails says so and the next one is tried.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_kernels import KernelCase, kernel_cases
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from peft_variator import PruningConfig, SparseLoraConfig, VariatorConfig, prune
from peft_variator.bases import Sparse24Linear
from peft_variator.bases.kernels import build_sparse_weight
from peft_variator.files import write_text
from peft_variator.profiling import (
    SHAPES,
    Candidate,
    count_flops,
    describe_environment,
    make_inputs,
    make_training_step,
    peak_memory,
    share_weights,
    time_alternately,
)
from peft_variator.triton_support import is_interpreted, triton_state
from peft_variator.weight_kernels.compiled import load_compiled
from peft_variator.weight_kernels.measured import MEASURED
from peft_variator.weight_kernels.product import MAX_TOKENS, FewTokensWeight, multiply


HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gpu"
RATIO = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """How a stage is run.

    Args:
        device: where.
        dry: tiny shapes, and figures that mean nothing.
        until: when to start no further row, by `time.monotonic`.
    """

    device: torch.device
    dry: bool
    until: float

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return torch.float32 if self.dry else torch.bfloat16

    def time(self, candidates: dict[str, Callable[[], object]]) -> Row:
        """Median milliseconds and peak bytes of each, timed in turn; what fails is named with its error."""
        found: Row = {}
        working = []
        for name, run in candidates.items():
            try:
                run()
                found[name] = {"peak_bytes": peak_memory(run, self.device)}
                working.append(Candidate(name, run))
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {error}"}
        rounds, least = (2, 0.0) if self.dry else (10, 0.05)
        samples = time_alternately(working, rounds, device=self.device, min_seconds=least) if working else {}
        for name, seconds in samples.items():
            found[name] |= {"milliseconds": 1e3 * statistics.median(seconds), "samples": seconds}
        return found


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Args:
        model: a name in `SHAPES`, or a model type of transformers whose default configuration is the published one.
        batch: sequences or images.
        length: tokens; 0 for images and sound.
        fields: what differs from the shape.
        compiled: whether it is compiled, too, which takes most of a minute.
    """

    model: str
    batch: int
    length: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.model} {self.batch}×{self.length}" if self.length else f"{self.model} {self.batch}"


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
WHISPER = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": 12, "decoder_ffn_dim": 3072}
CASES = [
    Case("llama-3.2-1b", 1, 2048, compiled=True),
    Case("bert-base", 64, 512, compiled=True),
    Case("llama", 1, 2048, LLAMA_8B),
    Case("bert-base", 8, 128, compiled=True),
    Case("llama", 1, 8192, LLAMA_8B),
    Case("llama-3.2-1b", 1, 512),
    Case("llama-3.2-1b", 1, 8192),
    Case("mpnet", 64, 128, {"vocab_size": 30527}),
    Case("vit-base", 64),
    Case("whisper", 8, fields=WHISPER),
]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 90,
}
SMALL_WHISPER = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
SMALL_WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "max_source_positions": 30}
DRY_CASES = [
    Case("bert", 2, 16, SMALL, compiled=True),
    Case("llama", 1, 16, SMALL | {"num_key_value_heads": 2}),
    Case("vit", 2, fields=SMALL | {"image_size": 32, "patch_size": 8}),
    Case("whisper", 2, fields=SMALL_WHISPER),
]


def built(case: Case, run: Run) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model of a case, drawn at random, and inputs."""
    torch.manual_seed(0)
    shape = SHAPES.get(case.model)
    fields = (shape.fields if shape else {}) | case.fields
    config = AutoConfig.for_model(shape.model_type if shape else case.model, **fields)
    causal = config.model_type == "llama"
    with run.device:
        model = (AutoModelForCausalLM if causal else AutoModel).from_config(config, dtype=run.dtype).eval()
    generator = torch.Generator().manual_seed(0)
    if config.model_type == "whisper":
        frames = torch.randn(case.batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        inputs = {"input_features": frames.to(run.dtype), "decoder_input_ids": torch.ones(case.batch, 1).long()}
    else:
        task = "vision" if config.model_type == "vit" else "causal" if causal else "encoder"
        lengths = torch.full((case.batch,), case.length)
        inputs = make_inputs(config, task, lengths, dtype=run.dtype, generator=generator)
        inputs.pop("attention_mask", None)  # no padding
    return model, {
        name: value.to(run.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }


def with_plugin(base: nn.Module, **options: Any) -> Any:
    """A second set of modules over the weights of `base`, with a plugin."""
    config = VariatorConfig(init_weights=False, compression_ratio=RATIO, **options)
    return get_peft_model(share_weights(base), config, autocast_adapter_dtype=False).eval()


def first_output(outputs: Any) -> Tensor:
    """Hidden states or logits."""
    return next(value for value in outputs.values() if isinstance(value, Tensor))


# Stages. Each yields rows.


def correctness(run: Run) -> Iterator[Callable[[], Row]]:
    """Identity, padding, compiled against eager, packed products against dense ones."""

    def compared(name: str, found: Tensor, expected: Tensor, allowed: float) -> Row:
        difference = float((found.double() - expected.double()).abs().max())
        return {"name": name, "difference": difference, "allowed": allowed, "passed": difference <= allowed}

    cases = DRY_CASES[:3] if run.dry else [CASES[3], CASES[5], *CASES[8:]]

    def identity(case: Case) -> Row:
        base, inputs = built(case, run)
        plugin = with_plugin(base)
        plugin.set_compression_ratio(1)
        found, expected = first_output(plugin(**inputs)), first_output(base(**inputs))
        return compared(f"k = 1 is the base: {case.name}", found, expected, 0.0)

    def padding(case: Case) -> Row:
        base, inputs = built(case, run)
        plugin, ids = with_plugin(base), inputs["input_ids"][:1]
        mask = torch.ones_like(ids)
        if "logits_to_keep" in inputs:
            pad, kept = (5, 0), slice(5, None)
        else:
            pad, kept = (0, 5), slice(None, -5)
        padded = {"input_ids": nn.functional.pad(ids, pad, value=3), "attention_mask": nn.functional.pad(mask, pad)}
        if "logits_to_keep" in inputs:
            padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        alone = first_output(plugin(input_ids=ids, attention_mask=mask))
        found = first_output(plugin(**padded))[:, kept]
        allowed = float(alone.abs().max()) * (1e-4 if run.dry else 0.05)
        return compared(f"padding changes nothing: {case.name}", found, alone, allowed)

    def compiled(case: Case) -> Row:
        base, inputs = built(case, run)
        plugin = with_plugin(base)
        expected = first_output(plugin(**inputs))
        found = first_output(torch.compile(plugin, backend="eager" if run.dry else "inductor")(**inputs))
        allowed = float(expected.abs().max()) * (1e-4 if run.dry else 0.05)
        return compared(f"compiled is eager: {case.name}", found, expected, allowed)

    def packed(rows: int, columns: int, tokens: int) -> Row:
        dense = two_four(rows, columns, run)
        layer = Sparse24Linear.from_dense(dense)
        x = torch.randn(tokens, columns, device=run.device, dtype=run.dtype)
        exact = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
        allowed = float((2 * torch.finfo(run.dtype).eps + 1e-5) * exact.abs().max())
        choice = layer.kernel()
        name = f"packed {rows}×{columns}, {tokens} tokens ({choice.kernel}: {choice.reason})"
        return compared(name, layer(x), exact, allowed)

    for case in cases:
        yield partial(identity, case)
    for case in cases:
        if case.length:
            yield partial(padding, case)
    yield partial(compiled, cases[0])
    for tokens in (1, 8, 512):
        yield partial(packed, *((64, 128) if run.dry else (4096, 4096)), tokens)


def captured(call: Callable[[], Any]) -> Callable[[], object]:
    """A call as a CUDA graph, with its inputs where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def plugin(run: Run) -> Iterator[Callable[[], Row]]:
    """Base and plugin: eager, as CUDA graphs, and compiled."""

    def measured(case: Case) -> Row:
        base, inputs = built(case, run)
        models = {"base": base, f"k = {RATIO}": with_plugin(base)}
        flops = {name: count_flops(model, inputs) for name, model in models.items()}
        calls: dict[str, Callable[[], object]] = {}
        failed: Row = {}
        for name, model in models.items():
            calls[f"{name}, eager"] = partial(model, **inputs)
            if run.device.type == "cuda":
                try:
                    calls[f"{name}, graph"] = captured(partial(model, **inputs))
                except Exception as error:
                    failed[f"{name}, graph"] = {"error": f"{type(error).__name__}: {error}"}
                    torch.cuda.synchronize()
            if case.compiled:
                compiled = torch.compile(model, backend="eager" if run.dry else "inductor")
                calls[f"{name}, compiled"] = partial(compiled, **inputs)
        found = run.time(calls) | failed
        row: Row = {"name": case.name, "flops": flops, "ideal": flops["base"] / flops[f"k = {RATIO}"], "calls": found}
        row["speedup"] = {
            how: found[f"base, {how}"]["milliseconds"] / found[f"k = {RATIO}, {how}"]["milliseconds"]
            for how in ("eager", "graph", "compiled")
            if all("milliseconds" in found.get(f"{name}, {how}", {}) for name in models)
        }
        return row

    for case in DRY_CASES if run.dry else CASES:
        yield partial(measured, case)


def two_four(rows: int, columns: int, run: Run) -> nn.Linear:
    """A dense layer of which each group of four has two zeros."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, device=run.device, dtype=run.dtype).requires_grad_(False)
    linear.weight.view(-1, 4)[:, 1::2] = 0
    return linear


def kernels(run: Run) -> Iterator[Callable[[], Row]]:
    """Each Triton kernel by its name, against the plain functions."""

    def measured(make: Callable[[], KernelCase]) -> Row:
        state = triton_state(run.device.type)
        if not state.runs:
            raise RuntimeError(f"Triton's kernels do not run: {state.reason}.")
        torch.manual_seed(0)
        case = make()
        row: Row = dict(case.compare())
        if not run.dry and case.dtype == run.dtype:  # the interpreter's times mean nothing, and take long
            row["calls"] = run.time({"kernel": case.kernel, "plain": case.plain(case.dtype)})
        return row

    for make in kernel_cases(run.device, run.dry):
        yield partial(measured, make)


def two_four_products(run: Run) -> Iterator[Callable[[], Row]]:
    """Dense, unpacked in each call, by the packed form, by sparse tensor cores, and what the layer chooses."""

    def measured(rows: int, columns: int, tokens: int) -> Row:
        dense = two_four(rows, columns, run)
        layer = Sparse24Linear.from_dense(dense)
        packed = FewTokensWeight(layer.compressed, layer.bitmask)
        x = torch.randn(tokens, columns, device=run.device, dtype=run.dtype)
        calls: dict[str, Callable[[], object]] = {
            "dense": partial(dense, x),
            "unpack": lambda: nn.functional.linear(x, layer.unpack(), layer.bias),
            "layer": partial(layer, x),
        }
        has_product = load_compiled("products").function is not None if run.dry else triton_state("cuda").runs
        if tokens <= MAX_TOKENS and has_product:
            calls["packed product"] = lambda: multiply(x, layer.bias, packed)
        sparse: dict[str, Row] = {}
        for kernel in ("cusparselt", "cutlass") if run.device.type == "cuda" else ():
            try:  # made once, as the layer keeps it
                weight = build_sparse_weight(dense.weight, kernel)  # type: ignore[arg-type]
                calls[kernel] = partial(nn.functional.linear, x, weight, dense.bias)
            except Exception as error:  # one that this GPU or this PyTorch does not have is told, and is no fault
                sparse[kernel] = {"unavailable": f"{type(error).__name__}: {error}"}
        before = set(MEASURED)
        layer(x)
        compared = [dict(MEASURED[key]) for key in MEASURED if key not in before]
        found = run.time(calls)
        times = {name: row["milliseconds"] for name, row in found.items() if "milliseconds" in row and name != "layer"}
        return {
            "name": f"{rows}×{columns}, {tokens} tokens",
            "calls": found,
            "unavailable": sparse,
            "fastest": min(times, key=times.__getitem__),
            "by_rule": layer.kernel().kernel,
            "compared_by_the_layer": compared,
        }

    shapes = [(64, 128)] if run.dry else [(14336, 4096), (4096, 14336), (8192, 2048), (4864, 896)]
    for tokens in (1, 8, 32, 512):
        for rows, columns in shapes:
            yield partial(measured, rows, columns, tokens)


def sparse_lora(run: Run) -> Iterator[Callable[[], Row]]:
    """A training step of LoRA and of SparseLoRA."""

    def measured(case: Case) -> Row:
        base, inputs = built(case, run)
        prune(base, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
        inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        configs = {
            "LoRA": LoraConfig(r=8, target_modules="all-linear"),
            "SparseLoRA": SparseLoraConfig(r=8),
        }
        steps: dict[str, Callable[[], object]] = {}
        for name, config in configs.items():
            model = get_peft_model(share_weights(base), config, autocast_adapter_dtype=False)
            steps[name] = make_training_step(
                model, lambda trained: first_output(trained(**inputs)).float().square().mean()
            )
        found = run.time(steps)
        row: Row = {"name": case.name, "calls": found}
        if all("milliseconds" in figures for figures in found.values()):
            row["times_lora"] = found["SparseLoRA"]["milliseconds"] / found["LoRA"]["milliseconds"]
        return row

    cases = DRY_CASES[:2] if run.dry else [Case("llama-3.2-1b", 1, 512), Case("bert-base", 16, 128)]
    for case in cases:
        yield partial(measured, case)


STAGES: dict[str, tuple[Callable[[Run], Iterator[Callable[[], Row]]], int]] = {
    "correctness": (correctness, 60),
    "kernels": (kernels, 60),
    "plugin": (plugin, 170),
    "two-four": (two_four_products, 55),
    "sparse-lora": (sparse_lora, 55),
}
"""What is run, in this order, and the seconds after which no further row is begun."""


def run_stage(name: str, dry: bool, output: Path) -> dict[str, Any]:
    """Run one stage in this process; its JSON is written after each row."""
    stage, seconds = STAGES[name]
    device = torch.device("cpu" if dry else "cuda:0")
    run = Run(device, dry, time.monotonic() + seconds)
    report: dict[str, Any] = {"stage": name, "dry": dry, "environment": describe_environment(device)}
    report |= {"dtype": str(run.dtype).removeprefix("torch."), "rows": [], "left_out": 0}
    learning = name in ("sparse-lora", "kernels")
    for row in stage(run):
        if time.monotonic() > run.until:
            report["left_out"] += 1
        else:
            report["rows"].append(_row(row, learning))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
        write_text(output / f"{name}.json", json.dumps(report, indent=1) + "\n")
    return report


def _row(row: Callable[[], Row], learning: bool) -> Row:
    start = time.monotonic()
    try:
        with torch.set_grad_enabled(learning):
            found = row()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return found | {"seconds": time.monotonic() - start}


def faults(report: dict[str, Any]) -> list[str]:
    """Rows that failed, and checks that were not passed."""
    told = []
    for row in report["rows"]:
        if "error" in row:
            told.append(row["error"])
        if row.get("passed") is False:
            told.append(f"{row['name']}: off by {row['difference']:.2e}, allowed {row['allowed']:.2e}")
        told += [
            f"{row['name']}, {name}: {call['error']}" for name, call in row.get("calls", {}).items() if "error" in call
        ]
    return told


def main(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages; left out: all.")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="Tiny shapes on the CPU, in this process.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON files.")] = RESULTS,
    alone: Annotated[bool, typer.Option("--alone", help="Run one stage in this process.")] = False,
) -> None:
    """Run the stages, each in a process of its own, and say what failed."""
    names = stages or list(STAGES)
    for name in names:
        if name not in STAGES:
            raise typer.BadParameter(f"{name!r} is no stage; they are {', '.join(STAGES)}.")
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter("There is no CUDA device; --dry runs tiny shapes on the CPU.")
    output.mkdir(parents=True, exist_ok=True)
    broken = False
    for name in names:
        if alone or (dry and (name != "kernels" or is_interpreted())):
            told = faults(run_stage(name, dry, output))
        else:
            told = _in_a_process(name, dry, output)
        broken = broken or bool(told)
        typer.echo(f"{name}: " + ("done" if not told else "; ".join(told)))
    raise typer.Exit(1 if broken else 0)


def _in_a_process(name: str, dry: bool, output: Path) -> list[str]:
    """Run a stage that may take its process with it; dry, one that Triton's interpreter runs, chosen on its import."""
    command = [sys.executable, __file__, name, "--alone", *(["--dry"] if dry else []), "--output", str(output)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {})
    path = output / f"{name}.json"
    path.unlink(missing_ok=True)
    try:
        limit = STAGES[name][1] + 60
        done = subprocess.run(command, timeout=limit, env=environment, stdout=subprocess.DEVNULL).returncode
        told = [] if done in (0, 1) else [f"the process ended with status {done}"]
    except subprocess.TimeoutExpired:
        told = ["stopped: the time was up"]
    return told + (faults(json.loads(path.read_text())) if path.exists() else ["no row was written"])


if __name__ == "__main__":
    typer.run(main)
