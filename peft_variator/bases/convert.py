"""Packing and unpacking checkpoints on disk, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Iterable

from transformers import PreTrainedModel

from .checkpoint import CheckpointError
from .completeness import check_complete
from .config import Sparse24Config
from .folder import ModelFolder
from .names import KeyNames
from .pieces import dense_piece, layers_left_dense, own_dtype, planned_piece
from .plan import Rules, check_size, plan_weights
from .shards import ConversionReport, OnProgress, rewrite
from .stored import StoredWeight, find_stored_weights


__all__ = ["pack_checkpoint", "unpack_checkpoint"]


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
        CheckpointError: nothing is 2:4, something is not that has to be, or a weight is missing; the message names
            file, tensor and row.
        FileExistsError: `output` exists and is not empty.
    """
    folder = ModelFolder.open(source)
    if folder.ours:
        raise CheckpointError(f"{folder.path} is packed already.")
    published = folder.published or Sparse24Config(format="dense")
    wanted = published.targets if targets is None else list(targets)
    rules = Rules(
        pack_dense=published.format == "dense",
        targets=None if wanted is None else tuple(wanted),
        ignore=(*published.ignore, *ignore),
    )
    model = folder.skeleton()
    planned = plan_weights(model, folder.checkpoint, rules, folder.dtype())
    check_complete(model, folder.checkpoint, (weight.stored for weight in planned))
    pieces = [planned_piece(weight) for weight in planned if weight.action != "as_is"]
    packed = (weight.module for weight in planned if weight.action != "dense")
    config = folder.packed_config(layers_left_dense(model, folder.checkpoint, packed))
    return rewrite(folder, output, pieces, config, {"task": "pack"}, on_progress)


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
        CheckpointError: a weight is damaged, missing, or of another shape than config.json says, or nothing is packed;
            the message names file, tensor and row.
        FileExistsError: `output` exists and is not empty.
    """
    folder = ModelFolder.open(source)
    stored = [weight for weight in find_stored_weights(folder.checkpoint.tensors).values() if not weight.plain]
    if not stored:
        raise CheckpointError(f"{folder.path} is dense already.")
    for weight in stored:
        weight.check()
    if folder.has_class:
        _compare(folder.skeleton(), folder, stored)
    dtype = folder.dtype()  # reads a file
    pieces = [dense_piece(weight, own_dtype(weight, dtype)) for weight in stored]
    return rewrite(folder, output, pieces, folder.config, {"task": "unpack"}, on_progress)


def _compare(model: PreTrainedModel, folder: ModelFolder, stored: Iterable[StoredWeight]) -> None:
    """Raise where the model of config.json has other parameters than the files, or parameters of other shapes."""
    names = KeyNames(model)
    for weight in stored:
        parameter = names.parameter(weight.name)
        if parameter is not None:
            check_size(weight, tuple(model.get_parameter_or_buffer(parameter).shape))
    check_complete(model, folder.checkpoint, stored)
