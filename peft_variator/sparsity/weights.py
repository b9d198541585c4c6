"""Reading and replacing the weights of layers, also of those that accelerate has put on the CPU or on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor

from ..compat import offload_hook
from .modules import PrunableModule


__all__ = ["apply_matrix", "read_matrix", "replace_matrix"]


def _orient(tensor: Tensor, target: PrunableModule) -> Tensor:
    return tensor.T if target.transposed else tensor


def read_matrix(target: PrunableModule) -> Tensor:
    """The weight as (out_features, in_features), on the device where the layer runs. Not to be written to."""
    with align_module_device(target.module):
        return _orient(target.module.weight.detach(), target)


def apply_matrix(target: PrunableModule, inputs: Tensor, matrix: Tensor, with_bias: bool = True) -> Tensor:
    """The layer's output with `matrix` (out_features, in_features) in place of its weight."""
    with align_module_device(target.module):
        return F.linear(inputs, matrix.to(inputs.device), target.module.bias if with_bias else None)


def replace_matrix(target: PrunableModule, matrix: Tensor) -> None:
    """Store `matrix` (out_features, in_features) as the layer's weight, where the weight is kept.

    Raises:
        ValueError: the weight is read from a checkpoint on disk and there is no folder to put another one.
    """
    weight = _orient(matrix, target)
    if not has_offloaded_params(target.module):
        with torch.no_grad():
            target.module.weight.copy_(weight)
        return
    hook: Any = offload_hook(target.module)
    weights, key = hook.weights_map, "weight"
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, weights.prefix + key
    if isinstance(weights, OffloadedWeightsLoader) and key not in weights.state_dict:
        _replace_on_disk(target.name, weights, key, weight)
        return
    store = weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights
    store[key] = weight.to(store[key].device, copy=True).contiguous()


def _replace_on_disk(name: str, weights: OffloadedWeightsLoader, key: str, weight: Tensor) -> None:
    """Put the weight in a new file of the offload folder and read it from there; no file that exists is changed."""
    if weights.save_folder is None:
        raise ValueError(
            f"{name!r} is offloaded to disk without a folder to write to. Load the model with offload_folder=..., or "
            "give it more memory."
        )
    path = Path(weights.save_folder) / f"{key}.pruned.safetensors"
    temporary = path.with_suffix(".partial")
    save_file({key: weight.cpu().contiguous()}, temporary)
    os.replace(temporary, path)
    weights.index[key] = {
        "safetensors_file": str(path),
        "weight_name": key,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
