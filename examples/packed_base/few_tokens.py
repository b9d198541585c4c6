"""One to a few tokens through a packed layer on a CPU: the packed product and unpacking, beside a dense layer.

    python examples/packed_base/few_tokens.py --threads 2

The layers have random 2:4 weights in the shapes of published models. All three are timed in turn.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn import functional as F

from peft_variator.bases import Sparse24Linear
from peft_variator.files import write_text
from peft_variator.profiling import Candidate, describe_environment, num_threads, time_alternately
from peft_variator.weight_kernels.compiled import LEVELS, load_compiled
from peft_variator.weight_kernels.product import FewTokensWeight, multiply


RESULTS = Path(__file__).resolve().parent / "results" / "few-tokens.json"
SHAPES = [(4864, 896), (8192, 2048), (2048, 8192), (14336, 4096)]
TOKENS = (1, 2, 4, 8, 16)


def measure(rows: int, columns: int, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, float]:
    """Median microseconds of each product, and how many times faster than the dense one they are."""
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, bias=False, dtype=dtype)
    with torch.no_grad():
        dense.weight.view(-1, 4)[:, 1::2] = 0
    layer = Sparse24Linear.from_dense(dense)
    x = torch.randn(tokens, columns, dtype=dtype)
    candidates = [
        Candidate("dense", partial(dense, x)),
        Candidate("packed", partial(multiply, x, None, FewTokensWeight(layer.compressed, layer.bitmask))),
        Candidate("unpacked in each call", lambda: F.linear(x, layer.unpack())),
    ]
    with torch.inference_mode():
        seconds = time_alternately(candidates, rounds, device=torch.device("cpu"), min_seconds=0.05)
    found = {name: 1e6 * statistics.median(samples) for name, samples in seconds.items()}
    return found | {"packed, times faster": found["dense"] / found["packed"]}


def main(
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed samples of each, at least 2.")] = 15,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = RESULTS,
) -> None:
    """Measure all shapes in bfloat16 and float32 and write the figures, in microseconds a call."""
    product = load_compiled("products")
    if product.function is None:
        raise typer.BadParameter(f"There is nothing to measure: {product.reason}.")
    rows = []
    with num_threads(threads):
        environment = describe_environment(torch.device("cpu"))
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                for tokens in TOKENS:
                    figures = measure(*shape, dtype, tokens, rounds)
                    rows.append({"shape": shape, "dtype": str(dtype)[6:], "tokens": tokens, **figures})
                    typer.echo(f"{shape} {str(dtype)[6:]} {tokens}: {figures['packed, times faster']:.2f} times dense")
    command = f"python examples/packed_base/few_tokens.py --threads {threads} --rounds {rounds}"
    command += "" if output == RESULTS else f" --output {output.name}"
    report = {"command": command, "instructions": LEVELS[product.level], "environment": environment, "rows": rows}
    write_text(output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
