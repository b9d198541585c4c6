"""How sparse a checkpoint on disk is, read slice by slice: the model is never loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bitmask import unpack_mask
from .patterns import Pattern
from .places import Place, place_by_config, place_by_name
from .report import ModuleSparsity, SparsityReport, count_module


__all__ = ["inspect_checkpoint"]

_SLICE = 1 << 24
"""Weights read at once."""


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the one there is."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if not path.exists():
        raise ValueError(f"{str(path)!r} does not exist. Give a directory with safetensors files, or one such file.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
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


def _add(total: ModuleSparsity | None, part: ModuleSparsity) -> ModuleSparsity:
    if total is None:
        return part
    met = None if part.pattern_met is None else bool(total.pattern_met) and part.pattern_met
    return replace(
        total,
        weights=total.weights + part.weights,
        zeros=total.zeros + part.zeros,
        negative_zeros=total.negative_zeros + part.negative_zeros,
        pattern_met=met,
    )


def _count_dense(tensor: Any, place: Place, pattern: Pattern | None) -> ModuleSparsity | None:
    shape = tensor.get_shape()
    if len(shape) != 2 or not tensor.get_dtype().startswith(("F", "BF")):
        return None
    width = shape[0] if place.transposed else shape[1]
    total = None
    for part in _slices(tensor, shape, place.transposed, pattern.group if pattern else 1):
        total = _add(total, count_module(*place[:3], part, pattern, shape=tuple(shape)))
    if total is not None and pattern is not None and width % pattern.group:
        total = replace(total, pattern_met=False)
    return total


def _count_packed(bitmask: Tensor, shape: Tensor, place: Place, pattern: Pattern | None) -> ModuleSparsity:
    """Count a weight that is stored as its non-zero values and a bitmask."""
    rows, width = (int(size) for size in shape)
    return count_module(*place[:3], unpack_mask(bitmask.view(rows, -1), width).float(), pattern)


def _count_file(
    file: Path, place_of: Callable[[str], Place | None], pattern: Pattern | None
) -> Iterator[ModuleSparsity]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                stem, _, kind = name.rpartition(".")
                if kind == "bitmask" and f"{stem}.shape" in names:
                    place = place_of(f"{stem.removesuffix('.weight')}.weight")
                    if place is not None:
                        shape = tensors.get_tensor(f"{stem}.shape")
                        yield _count_packed(tensors.get_tensor(name), shape, place, pattern)
                    continue
                place = place_of(name)
                entry = None if place is None else _count_dense(tensors.get_slice(name), place, pattern)
                if entry is not None:
                    yield entry
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is broken or cut off: {error}. Copy or download it again.") from error


def inspect_checkpoint(path: str | os.PathLike[str], pattern: str | None = None) -> SparsityReport:
    """Count the zeros of a checkpoint's linear layers without loading it: at most 2^24 weights are in memory.

    With a `config.json` of a transformers model beside the weights, its Linear and Conv1D modules are counted, with
    their blocks and modalities; without, every two-dimensional `.weight` (embeddings too), with blocks by name.
    `source["structure"]` of the report says which. Weights stored as values and bitmask count like dense ones.

    Args:
        path: a directory with safetensors files, sharded or not, or one such file.
        pattern: n:m pattern to check for.

    Raises:
        ValueError: there are no safetensors files, one is missing or broken, or it holds no linear layer; the pattern
            is malformed.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    root = Path(path)
    files = _files(root)
    by_config = place_by_config(root if root.is_dir() else root.parent)
    place_of = by_config or place_by_name
    entries = [entry for file in files for entry in _count_file(file, place_of, wanted)]
    if not entries:
        raise ValueError(f"{str(root)!r} holds no weight of a linear layer.")
    entries.sort(key=_natural)
    return SparsityReport(entries, {"path": str(root), "structure": "config.json" if by_config else "tensor names"})
