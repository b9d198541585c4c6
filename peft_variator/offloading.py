"""Keeping PEFT from writing to the files of a base that is offloaded to disk."""

from __future__ import annotations

from torch import nn

from .compat import offload_hook


__all__ = ["DISK_OFFLOAD_MESSAGE", "has_lost_its_hook", "is_offloading", "refuse_disk_offload", "refuse_rewriting"]

DISK_OFFLOAD_MESSAGE = (
    "The model is partly offloaded to disk, and PeftModel.from_pretrained rewrites the files that such a model was "
    "loaded from: it was stopped before it wrote anything. Load the model again, since this one has lost its weights, "
    "and without disk offload; device_map='cpu' will do. A SparseLoRA adapter can also be merged without loading the "
    "model, with `peft-variator merge`."
)


def has_lost_its_hook(module: nn.Module) -> bool:
    """Whether the parameters of a module are on disk and nothing is left that would bring them in."""
    on_disk = any(parameter.is_meta for parameter in module.parameters(recurse=False))
    return on_disk and offload_hook(module) is None


def refuse_rewriting(model: nn.Module) -> None:
    """Raise if an adapter is put on `model` by PEFT's `PeftModel.from_pretrained` and parts of the model are on disk.

    PEFT 0.21 takes the hooks off such a model, adds the adapter, and then writes every safetensors file that the
    model is offloaded to, with other names for the tensors, to its relative path: over the model's own file if the
    model was loaded by one. Creating an adapter leaves hooks and files alone.
    """
    # set by from_pretrained, where there is a device map
    if "disk" in getattr(model, "hf_device_map", {}).values() and any(map(has_lost_its_hook, model.modules())):
        raise ValueError(DISK_OFFLOAD_MESSAGE)


def refuse_disk_offload(model: nn.Module) -> None:
    """Raise if parts of `model` are on disk: transformers' `load_adapter` would send the adapter's tensors there too.

    For adapters that come from a file. Its loader takes what belongs to modules on disk to be on disk already, and
    leaves the adapter with the random numbers it was made of. New adapters can be put on such a model.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(
            "The model is partly offloaded to disk (see model.hf_device_map), and a saved adapter would not be loaded "
            "into it: its tensors would be looked for on the disk. Load the model without disk offload; "
            "device_map='cpu' will do."
        )


def is_offloading(module: nn.Module) -> bool:
    """Whether accelerate brings in the weights of a module for each call, and takes them away after it."""
    hook = offload_hook(module)
    return any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ())))
