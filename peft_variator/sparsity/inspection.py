"""How sparse a checkpoint on disk is, read slice by slice: the model is never loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..bases.checkpoint import read_index
from ..bases.loading_plan import KeyNames
from ..bitmask import mask_width, unpack_mask
from ..field_types import name_some, shown
from ..model_files import CONFIG_NAME, CheckpointError, adapter_base, download_hint, read_fields, read_model_config
from ..models import build_empty, model_class
from .modules import WHOLE_MODEL, find_prunable
from .patterns import Pattern
from .sparsity_report import ModuleSparsity, SparsityReport, add_up, count_module


__all__ = ["inspect_checkpoint"]

_SLICE = 1 << 24
"""Weights read at once."""


class Place(NamedTuple):
    """What a weight belongs to; `transposed`: it lies as (in_features, out_features)."""

    name: str
    block: str
    modality: str
    transposed: bool


PlaceOf = Callable[[str], Place | None]
"""Name of a tensor -> what it belongs to; None for what is no weight of a linear layer."""


def _place_by_config(folder: Path) -> PlaceOf | str:
    """Where tensors belong in the model that config.json describes; or why there is no such model."""
    if not (folder / CONFIG_NAME).is_file():
        return "There is no config.json of a transformers model"
    fields = read_fields(folder / CONFIG_NAME)
    if "model_type" not in fields:
        return "There is no config.json of a transformers model, as it names no model_type"
    if "auto_map" in fields:
        return "The model has code of its own"
    config = read_model_config(folder)
    cls = model_class(config)
    if cls is None:
        return f"config.json has architectures={shown(config.architectures)}, which names no model of transformers"
    model = build_empty(cls, config, folder)
    names = KeyNames(model)
    places = {
        f"{target.name}.weight": Place(target.name, target.block, target.modality, target.transposed)
        for target in find_prunable(model)
    }
    return lambda tensor: next((places[name] for name in names.targets(tensor) if name in places), None)


def _place_by_name(tensor: str) -> Place | None:
    """Where a tensor belongs, from its name alone: every ".weight" counts as a linear layer's."""
    if not tensor.endswith("weight"):
        return None
    name = tensor.removesuffix("weight").removesuffix(".")
    block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return Place(name, block[0] if block else name, WHOLE_MODEL, False)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint that `from_pretrained` reads, or the ones there are."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if not path.exists():
        raise ValueError(
            f"{str(path)!r} does not exist. Give a directory with safetensors files, or one such file."
            f"{download_hint(path)}"
        )
    if (path / SAFE_WEIGHTS_NAME).is_file():
        return [path / SAFE_WEIGHTS_NAME]
    whole = path / SAFE_WEIGHTS_INDEX_NAME
    indices = [whole] if whole.is_file() else sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ValueError(
            f"{str(path)!r} holds several checkpoints: {name_some(index.name for index in indices)}. Put the files of "
            "one into a folder of its own."
        )
    if indices:
        names = sorted(set(read_index(indices[0]).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ValueError(
                f"{indices[0].name} in {str(path)!r} names {missing}, which are not there: copy them too."
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{str(path)!r} holds no safetensors file. Checkpoints in pickle formats (.bin, .pt) are not read: load "
            "the model with transformers and save it with save_pretrained."
        )
    return files


def _natural(entry: ModuleSparsity) -> list[tuple[bool, int, str]]:
    """Sort key of names in which layer 10 comes after layer 2; files hold their tensors in alphabetical order."""
    parts = re.split(r"(\d+)", entry.name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _slices(tensor: Any, shape: list[int], transposed: bool, group: int) -> Iterator[Tensor]:
    """Parts of a stored matrix as (out_features, some in_features) or (some out_features, in_features)."""
    step = max(_SLICE // max(shape[1], 1) // group, 1) * group
    for start in range(0, shape[0], step):
        part = tensor[start : start + step]
        part = part.float() if part.dtype.itemsize < 2 else part
        yield part.T if transposed else part


def _count_dense(tensor: Any, place: Place, pattern: Pattern | None) -> ModuleSparsity | None:
    shape = tensor.get_shape()
    if len(shape) != 2 or not tensor.get_dtype().startswith(("F", "BF")):
        return None
    width = shape[0] if place.transposed else shape[1]
    slices = _slices(tensor, shape, place.transposed, pattern.group if pattern else 1)
    parts = [count_module(*place[:3], part, pattern) for part in slices]
    if not parts:
        return None
    total = replace(add_up(place.name, parts, place.block, place.modality), shape=tuple(shape))
    return replace(total, pattern_met=False) if pattern is not None and width % pattern.group else total


def _count_packed(tensors: Any, stem: str, file: Path, place: Place, pattern: Pattern | None) -> ModuleSparsity:
    """Count a weight that is stored as its non-zero values and a bitmask."""
    bitmask, size = tensors.get_tensor(f"{stem}.bitmask"), tensors.get_tensor(f"{stem}.shape").flatten().tolist()
    if len(size) != 2 or min(size) < 1 or tuple(bitmask.shape) != (size[0], mask_width(int(size[1]))):
        raise CheckpointError(
            f"{file}, tensor {stem}.bitmask: its shape {tuple(bitmask.shape)} and {stem}.shape, {size}, are not those "
            "of one matrix. The file is damaged; copy or download it again."
        )
    return count_module(*place[:3], unpack_mask(bitmask, size[1]).float(), pattern)


def _count_file(file: Path, place_of: PlaceOf, pattern: Pattern | None) -> Iterator[ModuleSparsity]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                stem, _, kind = name.rpartition(".")
                packed = kind == "bitmask" and f"{stem}.shape" in names
                place = place_of(f"{stem.removesuffix('.weight')}.weight" if packed else name)
                if place is None:
                    continue
                entry = (
                    _count_packed(tensors, stem, file, place, pattern)
                    if packed
                    else _count_dense(tensors.get_slice(name), place, pattern)
                )
                if entry is not None:
                    yield entry
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is broken or cut off: {error}. Copy or download it again.") from error


def inspect_checkpoint(path: str | os.PathLike[str], pattern: str | None = None) -> SparsityReport:
    """Count the zeros of a checkpoint's linear layers without loading it: at most 2^24 weights are in memory.

    With a `config.json` of a transformers model beside the weights, its Linear and Conv1D modules are counted, with
    their blocks and modalities; without, every two-dimensional `.weight` (embeddings too), with blocks by name.
    `source["structure"]` of the report says which, and `source["reason"]` why names alone had to do. Weights stored as
    values and bitmask count like dense ones.

    Args:
        path: a directory with safetensors files, sharded or not, or one such file.
        pattern: n:m pattern to check for.

    Raises:
        ValueError: there are no safetensors files, they are of several checkpoints, one is missing or broken, or it
            holds no linear layer; config.json has values of another kind; the pattern is malformed.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    root = Path(path)
    files = _files(root)
    found = _place_by_config(root if root.is_dir() else root.parent)
    place_of: PlaceOf = _place_by_name if isinstance(found, str) else found
    entries = [entry for file in files for entry in _count_file(file, place_of, wanted)]
    if not entries:
        base = adapter_base(root)
        hint = "" if base is None else f" It is an adapter: inspect its base{base}."
        raise ValueError(f"{str(root)!r} holds no weight of a linear layer.{hint}")
    entries.sort(key=_natural)
    if twice := {one.name for one, other in pairwise(entries) if one.name == other.name}:
        raise ValueError(
            f"{str(root)!r} holds more than one weight of {name_some(twice)}, in "
            f"{name_some(file.name for file in files)}: several checkpoints, or variants of one. Give one of the "
            "files instead."
        )
    source = {"path": str(root), "structure": "config.json"}
    if isinstance(found, str):
        source |= {"structure": "tensor names", "reason": found}
    return SparsityReport(entries, source)
