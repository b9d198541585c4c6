"""What else makes a text encoder faster: int8, fewer layers, narrower networks, the smaller model of the same makers.

python examples/real_models/peers.py --data DATA --cache CACHE --output JSON
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measure import measure
from recipes import RECIPES, make_dataset
from speed import SHAPES, speedups
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertModel, DataCollatorWithPadding
from transformers.utils import logging
from weights import load

from peft_variator.files import write_text
from peft_variator.profiling import describe_environment, num_threads


__all__ = ["drop_layers", "follow", "narrow", "quantize"]

NAME, SMALLER = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3"


def quantize(model: BertModel) -> nn.Module:
    """A copy whose Linear layers are int8, with the activations quantised as they come."""
    with warnings.catch_warnings():
        # torch points to another library for this, which the figures of int8 do not need.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def drop_layers(model: BertModel, kept: int) -> BertModel:
    """A copy with `kept` layers, evenly spaced, the first and the last among them.

    Raises:
        ValueError: `kept` is below 2 or more than there are.
    """
    layers = model.encoder.layer
    if not 2 <= kept <= len(layers):
        raise ValueError(f"kept={kept} has to be between 2 and {len(layers)}, the layers that there are.")
    places = [round(place * (len(layers) - 1) / (kept - 1)) for place in range(kept)]
    smaller = copy.deepcopy(model)
    smaller.encoder.layer = nn.ModuleList(smaller.encoder.layer[place] for place in places)
    smaller.config.num_hidden_layers = kept
    return smaller


@torch.no_grad()
def narrow(model: BertModel, width: int) -> BertModel:
    """A copy whose feed-forward networks keep the `width` hidden neurons j with the largest ‖w_j‖·‖v_j‖.

    Raises:
        ValueError: `width` is below 1 or more than the networks have.
    """
    inner = model.config.intermediate_size
    if not 1 <= width <= inner:
        raise ValueError(f"width={width} has to be between 1 and {inner}, the networks' own.")
    smaller = copy.deepcopy(model)
    for layer in smaller.encoder.layer:
        up, down = layer.intermediate.dense, layer.output.dense
        chosen = (up.weight.norm(dim=1) * down.weight.norm(dim=0)).topk(width).indices.sort().values
        up.weight, up.bias = nn.Parameter(up.weight[chosen]), nn.Parameter(up.bias[chosen])
        down.weight = nn.Parameter(down.weight[:, chosen].contiguous())
        up.out_features = down.in_features = width
    smaller.config.intermediate_size = width
    return smaller


def follow(
    student: nn.Module, teacher: nn.Module, batches: Iterable[dict[str, Tensor]], steps: int, learning_rate: float
) -> list[float]:
    """Train all weights of `student` to give the teacher's last hidden states; the loss of every step.

    The loss is the mean squared error over real tokens, divided by the batch's variance of what is to be given.
    """
    optimizer = torch.optim.AdamW(student.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(2, steps))
    losses = []
    for _, batch in zip(range(steps), batches, strict=False):
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            expected = teacher(**batch).last_hidden_state[real]
        found = student(**batch).last_hidden_state[real]
        loss = (found - expected).pow(2).mean() / expected.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Make the peers, measure quality and speed, and write one JSON, which grows peer by peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a data set")
    parser.add_argument("--cache", type=Path, required=True, help="folder that weights.py filled")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--steps", type=int, default=2500, help="steps of the peers that are trained")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--part", action="append", help="a part of the quality; all if not given")
    parser.add_argument("--limit", type=int, help="rows of a part at most")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with num_threads(arguments.threads):
        environment = describe_environment(torch.device("cpu"))
        base, smaller = load(NAME, arguments.cache), load(SMALLER, arguments.cache)
        teacher: Any = base.model
        trained = {
            "4 of 6 layers": drop_layers(teacher, 4),
            "3 of 6 layers": drop_layers(teacher, 3),
            "networks of 512": narrow(teacher, 512),
        }
        peers: dict[str, nn.Module] = {"int8": quantize(teacher), SMALLER: smaller.model, **trained}
        record: dict[str, Any] = {
            "model": NAME,
            "command": shlex.join(["python", *sys.argv]),
            "environment": environment,
            "speed": speedups(
                {"base": teacher, **peers}, "text", SHAPES["text"], rounds=arguments.rounds, device=torch.device("cpu")
            ),
            "quality": {},
        }
        recipe = RECIPES[NAME]
        for name, peer in peers.items():
            if name in trained:
                examples = make_dataset(NAME, base, arguments.data, arguments.steps * recipe.batch_size, seed=0)
                batches = DataLoader(
                    examples, batch_size=recipe.batch_size, collate_fn=DataCollatorWithPadding(base.tokenizer)
                )
                follow(peer, teacher, batches, arguments.steps, arguments.learning_rate)
            record["quality"][name] = measure(
                peer.eval(), base, "text", arguments.data, limit=arguments.limit, parts=arguments.part
            )
            write_text(arguments.output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
