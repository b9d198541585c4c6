"""Load the plugin of a quickstart run as anyone would, and check that it gives what it gave when it was saved.

python examples/quickstart/load_back.py outputs/quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from base import load_base
from evaluation import embed_at_ratios
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from text import load_corpus
from torch import Tensor

import peft_variator  # noqa: F401  without it PEFT does not know the plugin's type
from peft_variator.cli.console import reported


EMBEDDINGS, PLUGIN = "embeddings.safetensors", "plugin"


def main(folder: Annotated[Path, typer.Argument(help="What quickstart.py wrote.")]) -> None:
    """Embed the held-out text again, at every ratio, and compare bit for bit."""
    with reported():
        saved = {int(ratio): embeddings for ratio, embeddings in load_file(folder / EMBEDDINGS).items()}
        base, tokenizer = load_base()
        plugin = PeftModel.from_pretrained(base, folder / PLUGIN)
        texts = load_corpus().held_out[: len(next(iter(saved.values())))]
        _check(embed_at_ratios(plugin, tokenizer, texts, sorted(saved)), saved)
        ratios = ", ".join(map(str, sorted(saved)))
        Console().print(
            f"Loaded back in a fresh process: {len(texts)} embeddings at each of k = {ratios} are identical, bit for "
            "bit.",
            highlight=False,
            soft_wrap=True,
        )


def _check(embeddings: dict[int, Tensor], saved: dict[int, Tensor]) -> None:
    for ratio, expected in saved.items():
        if not torch.equal(embeddings[ratio], expected):
            difference = (embeddings[ratio] - expected).abs().max().item()
            raise ValueError(f"At k = {ratio} the loaded plugin's embeddings differ by up to {difference:.1e}.")


if __name__ == "__main__":
    typer.run(main)
