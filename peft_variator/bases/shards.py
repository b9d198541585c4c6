"""Rewriting a checkpoint on disk, tensor by tensor: pieces of it in, pieces of another one out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import write_text
from .checkpoint import INDEX_NAME, Checkpoint, StoredTensor
from .folder import ModelFolder
from .staging import StagedFolder
from .writer import ShardWriter, TensorSpec


__all__ = ["ConversionReport", "OnProgress", "Piece", "fingerprint", "rewrite"]

OnProgress = Callable[[int, int], None]
"""Called with the source bytes done and those there are."""

_CONFIG_NAME = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


@dataclass(frozen=True)
class Piece:
    """Tensors that are written in the place of others.

    Args:
        sources: what they are made from. They go to the file that has the same name as that of the first.
        specs: name -> dtype and shape.
        make: reads the sources and makes the tensors.
    """

    sources: tuple[StoredTensor, ...]
    specs: dict[str, TensorSpec]
    make: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Args:
        output: the folder it made.
        converted: how many weights changed their form.
        bytes_before: size of the source's tensors.
        bytes_after: size of the tensors written.
    """

    output: Path
    converted: int
    bytes_before: int
    bytes_after: int


def _copy_pieces(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces that copy all tensors which are not the source of one of `pieces`."""
    taken = {stored.name for piece in pieces for stored in piece.sources}
    return [_copy(stored) for name, stored in checkpoint.tensors.items() if name not in taken]


def _copy(stored: StoredTensor) -> Piece:
    spec = TensorSpec(stored.dtype, stored.shape)
    return Piece((stored,), {stored.name: spec}, lambda: {stored.name: stored.read()})


def rewrite(
    source: ModelFolder,
    output: str | os.PathLike[str],
    pieces: list[Piece],
    config: dict[str, Any],
    job: dict[str, Any],
    on_progress: OnProgress,
) -> ConversionReport:
    """Write the pieces, and all other tensors and files of the source as they are, to a new folder.

    Memory holds one piece at a time. A run that is killed leaves no folder at `output`; the same run takes it up, with
    the files that were complete. Nothing in `source` is written.

    Args:
        source: the model folder.
        output: the folder to make.
        pieces: what changes.
        config: the new config.json.
        job: what else decides what is written, to tell one run from another.
        on_progress: see `OnProgress`.

    Raises:
        FileExistsError: `output` exists and is not empty.
        CheckpointError: a piece can't be made.
    """
    files = [source.path / _CONFIG_NAME, *source.checkpoint.files]
    stage = StagedFolder(output, {"source": fingerprint(files), "config": config, **job})
    every = pieces + _copy_pieces(source.checkpoint, pieces)
    total = sum(_source_bytes(piece) for piece in every)
    done, weight_map = 0, {}
    for file in source.checkpoint.files:
        own = [piece for piece in every if piece.sources[0].file == file]
        specs = {name: spec for piece in own for name, spec in piece.specs.items()}
        weight_map.update(dict.fromkeys(specs, file.name))
        if own and not (stage.path / file.name).exists():
            with ShardWriter(stage.path / file.name, specs) as writer:
                for piece in own:
                    for name, tensor in piece.make().items():
                        writer.write(name, tensor)
                    done += _source_bytes(piece)
                    on_progress(done, total)
        else:
            done += sum(_source_bytes(piece) for piece in own)
            on_progress(done, total)
    after = sum(spec.nbytes for piece in every for spec in piece.specs.values())
    names = set(weight_map.values()) | {_CONFIG_NAME}
    if (source.path / INDEX_NAME).exists():
        index = {"metadata": {"total_size": after}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(stage.path / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        names.add(INDEX_NAME)
    names |= _copy_other_files(source.path, stage.path)
    write_text(stage.path / _CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
    stage.finish(names)
    return ConversionReport(stage.output, len(pieces), total, after)


def _source_bytes(piece: Piece) -> int:
    return sum(stored.nbytes for stored in piece.sources)


def fingerprint(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files, to tell whether they changed between two runs."""
    return [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _copy_other_files(source: Path, target: Path) -> set[str]:
    """Copy tokenizer, generation config and so on, but no weights and nothing hidden; returns the names copied."""
    names = set()
    for entry in source.iterdir():
        if entry.name.startswith(".") or entry.name == _CONFIG_NAME or entry.name.endswith(_WEIGHT_SUFFIXES):
            continue
        names.add(entry.name)
        if entry.is_dir():
            hidden_and_weights = shutil.ignore_patterns(".*", *(f"*{suffix}" for suffix in _WEIGHT_SUFFIXES))
            shutil.copytree(entry, target / entry.name, ignore=hidden_and_weights, dirs_exist_ok=True)
        else:
            shutil.copyfile(entry, target / entry.name)
    return names
