"""Checkpoints as others published them, written from the layouts' descriptions, and what they hold when read right."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .reference import reference_bits, reference_pack


SPARSITY = {
    "sparse-24-bitmask": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"},
    "sparse-bitmask": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"},
    "dense": {"format": "dense", "sparsity_structure": "2:4"},
}


def entry(sparsity: str | None, quantization: str | None = None, ignore: tuple[str, ...] = ("lm_head",)) -> dict:
    """`quantization_config` as compressed-tensors writes it."""
    config: dict = {"quant_method": "compressed-tensors"}
    if sparsity is not None:
        details = {"targets": ["Linear"], "ignore": list(ignore), "global_sparsity": 0.42}
        config["sparsity_config"] = {**SPARSITY[sparsity], **details}
    if quantization is not None:
        weights = {"num_bits": 8, "type": "int" if quantization.startswith("int") else "float"}
        config |= {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "format": quantization,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }
    return config


def sparse_24(prefix: str, weight: Tensor, flat_shape: bool = False) -> dict[str, Tensor]:
    """`compressed`, `bitmask`, `shape`; 8-bit floats are compared as bytes, as their writer does."""
    bytes_ = weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight
    compressed, bitmask = reference_pack(bytes_)
    shape = torch.tensor(weight.shape)
    return {
        f"{prefix}.compressed": compressed.view(weight.dtype),
        f"{prefix}.bitmask": bitmask,
        f"{prefix}.shape": shape if flat_shape else shape.reshape(-1, 1),
    }


def sparse_bitmask(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    """`compressed` (values,), `bitmask`, `shape`, `row_offsets`; a vector has one row."""
    bytes_ = weight.view(torch.int8) if weight.dtype == torch.float8_e4m3fn else weight
    mask = bytes_ != 0
    counts = mask.sum(dim=-1)
    bitmask = reference_bits(mask.reshape(-1, mask.shape[-1]))
    return {
        f"{prefix}.compressed": bytes_[mask].view(weight.dtype),
        f"{prefix}.bitmask": bitmask if weight.ndim == 2 else bitmask[0],
        f"{prefix}.shape": torch.tensor(weight.shape),
        f"{prefix}.row_offsets": torch.cumsum(counts, 0) - counts,
    }


def quantize(weight: Tensor, dtype: torch.dtype, strategy: str) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit values, their scale, and the weight that they stand for, in float32."""
    rows, columns = weight.shape
    largest = 127 if dtype == torch.int8 else 448
    groups = {"tensor": weight.reshape(1, -1), "channel": weight, "group": weight.reshape(rows, columns // 4, 4)}[
        strategy
    ]
    scale = (groups.abs().amax(dim=-1, keepdim=True) / largest).clamp(min=1e-6).float()
    scaled = groups / scale
    values = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    dense = (values.float() * scale).reshape(rows, columns)
    shape = {"tensor": (1,), "channel": (rows, 1), "group": (rows, columns // 4)}[strategy]
    return values.reshape(rows, columns), scale.reshape(shape), dense


def linear_weights(model: PreTrainedModel, leave: tuple[str, ...] = ("lm_head",)) -> dict[str, Tensor]:
    """Name of every linear layer but those left -> its weight."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module.weight.detach() for name, module in modules.items() if name not in leave}


def write_model(
    folder: Path, model: PreTrainedModel, state: dict[str, Tensor], quantization_config: dict | None, **config
) -> Path:
    """A model folder with the given tensors."""
    model.config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": [type(model).__name__], "dtype": "float32", **config}
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder
