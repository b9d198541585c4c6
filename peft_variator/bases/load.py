"""`load_base`: load a 2:4 model in whatever layout it was published, and keep it packed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .checkpoint import Checkpoint
from .config import METHOD, Sparse24Config
from .linear import Unpacked


__all__ = ["load_base", "translate_compressed_tensors"]

_HUB_ARGUMENTS = (
    "revision",
    "code_revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
)
_QUANTIZED_FORMATS = ("dense", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized")


def load_base(
    path: str | os.PathLike[str],
    auto_class: Any = AutoModelForCausalLM,
    *,
    unpacked: Unpacked = "forward",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a 2:4 model: one that this package packed, or one published as `sparse-24-bitmask`, as `sparse-bitmask`, in
    8 bits with scales over either, or dense with its zeros. Layers that are 2:4 stay or become packed.

    Args:
        path: directory, or repository on the Hub.
        auto_class: the class whose `from_pretrained` loads it.
        unpacked: when the dense weights exist, see `Sparse24Linear`.
        kwargs: for `from_pretrained`; `dtype` is the one that 8-bit weights are decompressed to.

    Raises:
        CheckpointError: the files are damaged or incomplete, or not 2:4 where they have to be.
        ValueError: the model is quantized in a way that can't be read.
    """
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = AutoConfig.from_pretrained(path, **hub)
    if config.dtype is None and not kwargs.get("dtype") and not kwargs.get("subfolder") and Path(path).is_dir():
        # otherwise transformers takes it from the first floating tensor of the files, before they are checked
        kwargs["dtype"] = Checkpoint.from_directory(path).dtype
    # config.json had the entry `compression_config` before transformers knew the format
    entry = config.to_dict().get("quantization_config") or config.to_dict().get("compression_config")
    if entry is None:
        quantization = Sparse24Config(unpacked=unpacked)
        return auto_class.from_pretrained(path, config=config, quantization_config=quantization, **kwargs)
    if entry.get("quant_method") != METHOD:
        entry = translate_compressed_tensors(entry).to_dict()
    entry["sparsity_config"]["unpacked"] = unpacked
    config.quantization_config = entry
    vars(config).pop("compression_config", None)
    return auto_class.from_pretrained(path, config=config, **kwargs)


def translate_compressed_tensors(entry: dict[str, Any]) -> Sparse24Config:
    """What the `quantization_config` of a model written by compressed-tensors says about its sparsity.

    Raises:
        ValueError: the model is quantized in a way that can't be read.
    """
    method = entry.get("quant_method", "compressed-tensors")
    quantized_format = entry.get("format") or "dense"
    if method != "compressed-tensors" or quantized_format not in _QUANTIZED_FORMATS:
        raise ValueError(
            f"The model is quantized with quant_method={method!r}, format={quantized_format!r}, which can't be read. "
            f"compressed-tensors can, with format {', '.join(_QUANTIZED_FORMATS)}."
        )
    sparsity = entry.get("sparsity_config") or {}
    # what is called unstructured may still be 2:4; then nothing has to be
    claimed = str(sparsity.get("sparsity_structure")).lower() == "2:4" and sparsity.get("targets")
    return Sparse24Config(
        targets=sparsity["targets"] if claimed else None,
        ignore=sparsity.get("ignore") or (),
        format=sparsity.get("format") or "dense",
    )
