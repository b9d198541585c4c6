"""A tiny 2:4 model on disk, dense, packed and in the layout of others, and an adapter for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_variator import PruningConfig, SparseLoraConfig, prune
from peft_variator.bases import pack_checkpoint


__all__ = ["contents", "make_folders"]


def make_folders(folder: Path, shard_size: str) -> None:
    """Write `dense`, `packed`, `foreign` and `adapter` into `folder`.

    Args:
        folder: where.
        shard_size: largest size of a file of the dense model, and so of the packed one's.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=92,  # rows of down_proj that do not end on a byte
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    prune(model, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
    model.save_pretrained(folder / "dense", max_shard_size=shard_size)
    pack_checkpoint(folder / "dense", folder / "packed")
    _make_foreign(folder)
    adapted = get_peft_model(model, SparseLoraConfig(r=8, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")


def _make_foreign(folder: Path) -> None:
    """The packed model as compressed-tensors wrote it: without checksums."""
    (folder / "foreign").mkdir()
    tensors = {
        name: tensor for file in (folder / "packed").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    save_file(tensors, folder / "foreign" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "packed" / "config.json").read_text())
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (folder / "foreign" / "config.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[str, str]:
    """Name -> digest of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(_ordered(path)).hexdigest() for path in files}


def _ordered(path: Path) -> bytes:
    """The bytes of a file; those of a safetensors file with sorted metadata: safetensors writes it in any order."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if path.suffix != ".safetensors" or start > len(data):
        return data
    try:
        return json.dumps(json.loads(data[8:start]), sort_keys=True).encode() + data[start:]
    except ValueError:  # half written
        return data
