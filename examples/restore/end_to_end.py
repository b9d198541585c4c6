"""A real encoder: pruned, packed, restored above the packed weights, merged, saved, and loaded by a fresh process.

    python examples/restore/end_to_end.py --data DATA

The model is all-MiniLM-L6-v2, pruned 2:4 with Wanda. After every hand-over the test set of STS-B is embedded, and the
embeddings are compared with those before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from encoder import Encoder
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, set_seed

from peft_variator.bases import Sparse24Linear, pack_checkpoint
from peft_variator.files import write_text
from peft_variator.profiling import describe_environment


HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "packed_base" / "results" / "end-to-end.json"
console = Console(soft_wrap=True, highlight=False)


class Chain:
    """What was found at each stage.

    Args:
        encoder: the model's text and test.
        folder: where the stages' files are.
    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.encoder, self.folder = encoder, folder
        self.stages: list[dict[str, Any]] = []
        self._embeddings: Tensor | None = None

    def add(self, name: str, embeddings: Tensor, files: str | None = None) -> None:
        """Compare with the stage before.

        Args:
            name: of the stage.
            embeddings: (sentences, hidden_size).
            files: folder whose safetensors files hold the stage; None if nothing new was written.
        """
        last, self._embeddings = self._embeddings, embeddings
        row = {
            "stage": name,
            "spearman": self.encoder.correlate(embeddings),
            "bytes": None if files is None else _bytes(self.folder / files),
            "largest_embedding": embeddings.abs().max().item(),
            "difference": None if last is None else (embeddings - last).abs().max().item(),
        }
        self.stages.append(row)
        difference = "" if last is None else f", embeddings differ by up to {row['difference']:.1e}"
        console.print(f"{name}: STS-B {row['spearman']:.4f}{difference}")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _load(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, add_pooling_layer=False)


def prune_and_pack(chain: Chain, seed: int) -> PreTrainedModel:
    """Dense, pruned, packed: the model with packed layers, loaded from its files."""
    encoder, folder = chain.encoder, chain.folder
    encoder.dense.save_pretrained(folder / "dense")
    chain.add("dense", encoder.embed(encoder.dense), "dense")
    pruned = encoder.prune("2:4", seed)
    pruned.save_pretrained(folder / "pruned")
    chain.add("pruned 2:4", encoder.embed(pruned), "pruned")
    pack_checkpoint(folder / "pruned", folder / "packed")
    packed = _load(folder / "packed")
    chain.add("packed", encoder.embed(packed), "packed")
    return packed


def restore_and_merge(chain: Chain, packed: PreTrainedModel, seed: int) -> dict[str, int]:
    """Train an adapter above the packed layers and merge it into them; their number and that of the parameters."""
    encoder, folder = chain.encoder, chain.folder
    restored = encoder.restore(packed, seed)
    parameters = restored.get_nb_trainable_parameters()[0]
    restored.save_pretrained(folder / "adapter")
    # the model inside: the training's bfloat16 autocast stays around the forward of the one it was given
    chain.add("adapter on packed", encoder.embed(restored.get_base_model()), "adapter")
    loaded = PeftModel.from_pretrained(_load(folder / "packed"), folder / "adapter")
    chain.add("adapter, loaded", encoder.embed(loaded))
    merged = loaded.merge_and_unload(safe_merge=True)
    chain.add("merged", encoder.embed(merged))
    merged.save_pretrained(folder / "merged")
    layers = sum(isinstance(module, Sparse24Linear) for module in merged.modules())
    return {"trained_parameters": parameters, "packed_layers": layers}


def load_back(chain: Chain, data: Path) -> None:
    """Embed with what a process of its own loads."""
    file = chain.folder / "embeddings.safetensors"
    command = [sys.executable, HERE / "load_back.py", chain.folder / "merged", file, "--data", data]
    subprocess.run([str(word) for word in command], check=True)
    chain.add("merged, in a fresh process", load_file(file)["embeddings"], "merged")


def check(stages: list[dict[str, Any]]) -> None:
    """Raise where a hand-over that must not change anything does.

    Raises:
        ValueError: embeddings differ more than rounding in float32 allows.
    """
    # The effective weight of an adapter and a merged one are the same sum, in another order of operations.
    allowed = {"packed": 0.0, "adapter, loaded": 0.0, "merged": 1e-4, "merged, in a fresh process": 0.0}
    for row in stages:
        limit = allowed.get(row["stage"], float("inf"))
        if row["difference"] is not None and row["difference"] > limit:
            raise ValueError(f"{row['stage']}: embeddings differ by {row['difference']:.1e}, more than {limit:.1e}.")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def main(
    data: Annotated[Path, typer.Option(help="Folder of stsb, wikitext2_valid_test and tinystories_sample.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of the restoration.")] = 300,
    seed: Annotated[int, typer.Option(help="Of calibration, adapter and batches.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the figures.")] = RESULTS,
) -> None:
    """Go through all stages and write the figures."""
    set_seed(seed)
    environment = describe_environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        chain = Chain(Encoder(data, steps), Path(scratch))
        packed, pruning = _timed(lambda: prune_and_pack(chain, seed))
        facts, restoring = _timed(lambda: restore_and_merge(chain, packed, seed))
        load_back(chain, data)
    report = {
        "command": f"python examples/restore/end_to_end.py --data DATA --steps {steps} --seed {seed}",
        "environment": environment,
        "steps": steps,
        "seed": seed,
        **facts,
        "cpu_seconds": {"prune and pack": pruning, "restore and merge": restoring},
        "stages": chain.stages,
    }
    check(chain.stages)
    write_text(output, json.dumps(report, indent=2) + "\n")
    console.print(f"{output} is written. Next: python examples/packed_base/render.py")


if __name__ == "__main__":
    typer.run(main)
