"""Packing and unpacking checkpoints on disk, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..architectures import model_class
from .bits import mask_width
from .checkpoint import Checkpoint, CheckpointError
from .config import METHOD, Sparse24Config
from .load import translate_compressed_tensors
from .names import KeyNames
from .plan import PlannedWeight, Rules, plan_weights
from .shards import ConversionReport, OnProgress, Piece, read_config, rewrite
from .stored import StoredWeight, find_stored_weights
from .writer import TensorSpec


__all__ = ["make_skeleton", "pack_checkpoint", "packed_piece", "unpack_checkpoint"]

_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    on_progress: OnProgress = lambda done, total: None,
) -> ConversionReport:
    """Pack the 2:4 linear layers of a model folder into a new folder that `from_pretrained` loads.

    The source may be dense, or stored in any layout that `load_base` reads. Other tensors are copied bit for bit. See
    `rewrite` for memory, and for what happens when it is interrupted.

    Args:
        source: folder with config.json and safetensors files.
        output: the folder to make.
        targets: layers that have to be 2:4, see `Sparse24Config`; None packs those that are.
        ignore: layers to leave as they are.
        on_progress: called with the bytes done and those there are.

    Raises:
        CheckpointError: nothing is 2:4, or something is not that has to be; the message names file, tensor and row.
        FileExistsError: `output` exists and is not empty.
    """
    folder = Path(source)
    config = read_config(folder)
    entry = config.get("quantization_config") or config.get("compression_config")
    if entry and entry.get("quant_method") == METHOD:
        raise CheckpointError(f"{folder} is packed already.")
    published = translate_compressed_tensors(entry) if entry else Sparse24Config(format="dense")
    wanted = published.targets if targets is None else list(targets)
    rules = Rules(
        pack_dense=published.format == "dense",
        targets=None if wanted is None else tuple(wanted),
        ignore=(*published.ignore, *ignore),
    )
    checkpoint = Checkpoint.from_directory(folder)
    model = make_skeleton(folder)
    planned = plan_weights(model, checkpoint, rules, model.config.dtype or torch.float32)
    pieces = [_planned_piece(weight) for weight in planned if weight.action != "as_is"]
    left = _left_dense(model, checkpoint, planned)
    job = {"task": "pack", "targets": rules.targets, "ignore": rules.ignore}
    return rewrite(folder, output, checkpoint, pieces, _packed_config(config, checkpoint, left), job, on_progress)


def unpack_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    on_progress: OnProgress = lambda done, total: None,
) -> ConversionReport:
    """Make a model folder dense, its zeros +0.0, from any layout that `load_base` reads, into a new folder.

    8-bit weights get the dtype of config.json. No trace of sparsity stays in config.json: some engines refuse a dense
    model that has one. See `rewrite` for memory, and for what happens when it is interrupted.

    Args:
        source: folder with config.json and safetensors files.
        output: the folder to make.
        on_progress: called with the bytes done and those there are.

    Raises:
        CheckpointError: a weight is damaged, or nothing is packed; the message names file, tensor and row.
        FileExistsError: `output` exists and is not empty.
    """
    folder = Path(source)
    config = read_config(folder)
    checkpoint = Checkpoint.from_directory(folder)
    entry = config.pop("quantization_config", None) or config.pop("compression_config", None) or {}
    config.pop("compression_config", None)
    if entry.get("quant_method") == METHOD:
        if Sparse24Config.from_entry(entry).checksums:
            checkpoint.check_checksums()
    elif entry:
        translate_compressed_tensors(entry)  # raises where it is quantized in another way
    dtype = AutoConfig.from_pretrained(folder).dtype or torch.float32
    stored = [weight for weight in find_stored_weights(checkpoint.tensors).values() if not weight.plain]
    if not stored:
        raise CheckpointError(f"{folder} is dense already.")
    for weight in stored:
        weight.check()
    pieces = [dense_piece(weight, _own_dtype(weight, dtype)) for weight in stored]
    return rewrite(folder, output, checkpoint, pieces, config, {"task": "unpack"}, on_progress)


def make_skeleton(folder: Path) -> PreTrainedModel:
    """The model that a config.json describes, dense and without weights.

    Raises:
        CheckpointError: its architecture is no class of transformers.
    """
    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    cls = model_class(config)
    if cls is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures={config.architectures} names no class of transformers, so its "
            "linear layers are unknown. Load the model with its own code and Sparse24Config, and save it."
        )
    with torch.device("meta"):
        return cls(config)


def packed_piece(weight: StoredWeight, dtype: torch.dtype) -> Piece:
    """A piece that packs one stored weight."""
    rows, columns = weight.size()
    specs = {
        "compressed": TensorSpec(dtype, (rows, columns // 2)),
        "bitmask": TensorSpec(torch.uint8, (rows, mask_width(columns))),
        "shape": TensorSpec(torch.int64, (2, 1)),
    }
    return Piece(
        weight.sources,
        {f"{weight.module}.{part}": spec for part, spec in specs.items()},
        lambda: {f"{weight.module}.{part}": tensor for part, tensor in weight.read_packed(dtype)._asdict().items()},
    )


def dense_piece(weight: StoredWeight, dtype: torch.dtype) -> Piece:
    """A piece that unpacks, or rescales, one stored weight."""
    spec = TensorSpec(dtype, weight.size())
    return Piece(weight.sources, {weight.name: spec}, lambda: {weight.name: weight.read_dense(dtype)})


def _planned_piece(weight: PlannedWeight) -> Piece:
    make = packed_piece if weight.action == "packed" else dense_piece
    return make(weight.stored, _own_dtype(weight.stored, weight.dtype))


def _own_dtype(weight: StoredWeight, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight is stored in, or `dtype` for 8-bit values."""
    return dtype if weight.quantized else weight.main.dtype


def _left_dense(model: PreTrainedModel, checkpoint: Checkpoint, planned: Iterable[PlannedWeight]) -> list[str]:
    """The linear layers that are not packed, by their name in the checkpoint, or in the model where they have none."""
    names = KeyNames(model)
    packed = {weight.module for weight in planned if weight.action != "dense"}
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear} - packed
    stored = {(names.parameter(name) or "").rpartition(".")[0]: name.rpartition(".")[0] for name in checkpoint.tensors}
    return sorted(stored.get(name, name) for name in dense)


def _packed_config(config: dict[str, Any], checkpoint: Checkpoint, left_dense: list[str]) -> dict[str, Any]:
    entry = Sparse24Config(targets=["Linear"], ignore=left_dense, checksums=True).to_dict()
    new = {name: value for name, value in config.items() if name != "compression_config"}
    if not new.get("dtype") and not new.get("torch_dtype"):
        # otherwise transformers takes it from the first floating tensor of the files, before they are checked
        dtypes = (stored.dtype for stored in checkpoint.tensors.values() if stored.dtype in _MODEL_DTYPES)
        new["dtype"] = str(next(dtypes, torch.float32)).removeprefix("torch.")
    return {**new, "quantization_config": entry}
