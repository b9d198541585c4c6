"""How many times faster models are than the base, measured in turn in one process.

python examples/real_models/speed.py --cache CACHE --model all-MiniLM-L6-v2 --plugin FOLDER --ratio 4 --output JSON
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import quantize, with_plugin
from torch import nn
from transformers.utils import logging
from vision_quality import PHOTOGRAPH_SIDE
from weights import WEIGHTS, load

from peft_variator.files import write_text
from peft_variator.profiling import (
    Candidate,
    describe_environment,
    num_threads,
    share_weights,
    speedup,
    time_alternately,
)


__all__ = ["SHAPES", "make_inputs", "speedups"]

# Batch × length of each kind; images and sounds have a length of their own.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "text": ((32, 128), (8, 128), (8, 256), (1, 128)),
    "causal": ((1, 512), (1, 1024)),
    "vision": ((1, 0), (8, 0)),
    "audio": ((1, 0),),
}


def make_inputs(kind: str, model: Any, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs without padding: what is in them does not change the time; a picture's length is its side in pixels."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vision":
        side = length or PHOTOGRAPH_SIDE
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}
    if kind == "audio":
        return {"input_features": torch.randn(batch, 80, 3000, generator=generator)}
    # The first thousand ids hold most special tokens, which a plugin treats apart.
    ids = torch.randint(1000, model.config.vocab_size, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # A prefill: the logits of the last position are all that is computed and used.
    return inputs | ({"logits_to_keep": 1} if kind == "causal" else {})


@torch.inference_mode()
def speedups(
    models: Mapping[str, nn.Module], kind: str, shapes: Sequence[tuple[int, int]], *, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Speed-up of each model over the first one, at each batch × length.

    Args:
        models: name → model in evaluation mode; the first is the base.
        kind: a key of `SHAPES`.
        shapes: batch and length.
        rounds: timed samples of each.
        device: where the models are.

    Returns:
        For each shape the median seconds of the base, and of every other the quartiles of the speed-up.
    """
    base, *others = models
    rows = []
    for batch, length in shapes:
        inputs = make_inputs(kind, models[base], batch, length)
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        candidates = [Candidate(name, partial(model, **inputs)) for name, model in models.items()]
        seconds = time_alternately(candidates, rounds, device=device)
        rows.append(
            {
                "batch": batch,
                "length": length,
                "seconds": sorted(seconds[base])[rounds // 2],
                "speedup": {name: asdict(speedup(seconds[base], seconds[name])) for name in others},
            }
        )
    return rows


def main() -> None:
    """Time a plugin beside its base, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--model", choices=list(WEIGHTS), required=True)
    parser.add_argument("--plugin", type=Path, required=True, help="folder of a plugin")
    parser.add_argument("--ratio", type=int, help="the plugin's compression ratio; its own if not given")
    parser.add_argument("--min-tokens", type=int, default=0, help="tokens of a call below which the base runs")
    parser.add_argument("--int8", action="store_true", help="base and plugin in int8, beside the base in int8 alone")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    device, kind = torch.device("cpu"), WEIGHTS[arguments.model].kind
    with num_threads(arguments.threads):
        environment = describe_environment(device)
        base: Any = load(arguments.model, arguments.cache).model
        int8 = {"int8": quantize(base)} if arguments.int8 else {}
        inner = quantize(base) if arguments.int8 else share_weights(base)
        plugin: Any = with_plugin(inner, arguments.plugin, arguments.ratio)
        plugin.set_min_tokens(arguments.min_tokens)
        if kind == "audio":
            base, plugin = base.get_encoder(), plugin.get_base_model().get_encoder()
        models = {"base": base, **int8, "plugin": plugin}
        rows = speedups(models, kind, SHAPES[kind], rounds=arguments.rounds, device=device)
    record = {
        "model": arguments.model,
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment,
        "rows": rows,
    }
    write_text(arguments.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
