"""Model folders to measure: a published shape, random weights, pruned 2:4 by magnitude; dense and packed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from peft_variator.bases import pack_checkpoint
from peft_variator.profiling import SHAPES, build_model
from peft_variator.sparsity import PruningConfig, prune


__all__ = ["FOLDERS", "make_folders", "size_of"]

FOLDERS = ("dense-float32", "dense-bfloat16", "packed-bfloat16")
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def make_folders(model: str, work: Path, quick: bool) -> Path:
    """Write the three folders of a model under `work`, unless they are there; gives the folder they are in.

    Args:
        model: a name in `SHAPES`.
        work: where the folders go.
        quick: take a tiny model of the architecture.
    """
    home = work / (f"{model}-tiny" if quick else model)
    packed = home / "packed-bfloat16"
    if packed.is_dir():
        return home
    torch.manual_seed(0)
    shape = SHAPES[model]
    config = AutoConfig.for_model(shape.model_type, **shape.fields | (TINY if quick else {}))
    dense = build_model(
        model, config, shape.task, dtype=torch.float32, device=torch.device("cpu"), random_weights=True
    )
    prune(dense, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
    dense.save_pretrained(home / "dense-float32")
    dense.to(torch.bfloat16).save_pretrained(home / "dense-bfloat16")
    pack_checkpoint(home / "dense-bfloat16", packed)
    return home


def size_of(folder: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
