"""Packing and unpacking checkpoints on disk, weight by weight, without loading the model.

A conversion opens a `ModelFolder`, makes a `Piece` of every weight that changes its form, and has `rewrite` write
them, with everything else copied, to a folder that appears when it is whole.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..adapter_card import set_license
from ..bitmask import mask_width
from ..files import check_new_folder, naming_full_disk, sole_writer, write_text
from ..model_files import ADAPTER_CONFIG_NAME, CONFIG_NAME, CheckpointError, read_config, read_model_config
from ..models import build_empty, model_class
from ..sentence_folder import copy_files, sentence_files
from .checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint, ShardWriter, StoredTensor, TensorSpec
from .compressed_tensors import StoredWeight, find_stored_weights
from .config import (
    METHOD,
    README_NAME,
    Rules,
    Sparse24Config,
    drop_notice,
    names_dtype,
    pop_quantization,
    read_quantization,
    write_notice,
)
from .loading_plan import KeyNames, PlannedWeight, check_complete, check_sizes, plan_weights
from .packing import PackedWeight


__all__ = [
    "ConversionReport",
    "ModelFolder",
    "OnProgress",
    "Piece",
    "dense_piece",
    "file_states",
    "layers_left_dense",
    "pack_checkpoint",
    "packed_names",
    "packed_specs",
    "planned_piece",
    "replaced_piece",
    "rewrite",
    "unpack_checkpoint",
]


OnProgress = Callable[[int, int], None]
"""Called with the source bytes done and those there are."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_STATE_NAME = ".conversion.json"


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


def pack_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    targets: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    on_progress: OnProgress = lambda done, total: None,
    license: str | None = None,
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
        license: identifier of the license to name in README.md; None leaves it as it is.

    Raises:
        CheckpointError: nothing is 2:4, something is not that has to be, or a weight is missing; the message names
            file, tensor and row.
        FileExistsError: `output` exists and is not empty.
    """
    folder = ModelFolder.open(source)
    if folder.ours:
        raise CheckpointError(f"{folder.path} is packed already.")
    rules = folder.rules
    if targets is not None:
        rules = replace(rules, targets=tuple(targets))
    model = folder.skeleton()
    planned = plan_weights(model, folder.checkpoint, replace(rules, ignore=(*rules.ignore, *ignore)), folder.dtype)
    folder.check(model)
    pieces = [planned_piece(weight) for weight in planned if weight.action != "keep"]
    packed = (weight.module for weight in planned if weight.becomes_packed)
    config = folder.packed_config(layers_left_dense(model, folder.checkpoint, packed))
    return rewrite(folder, output, pieces, config, {"task": "pack"}, on_progress, license)


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
    folder.check(folder.skeleton() if model_class(folder.model_config) is not None else None)
    pieces = [dense_piece(weight, weight.own_dtype(folder.dtype)) for weight in stored]
    return rewrite(folder, output, pieces, folder.config, {"task": "unpack"}, on_progress)


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json and safetensors files.

    Args:
        path: the folder.
        config: config.json without what it says about quantization.
        published: what it says about sparsity; None for a plain dense model.
        checkpoint: the tensors.
        ours: whether this package packed it.
        model_config: config.json as transformers reads it.
    """

    path: Path
    config: dict[str, Any]
    published: Sparse24Config | None
    checkpoint: Checkpoint
    ours: bool
    model_config: PreTrainedConfig

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelFolder:
        """Read a folder's config.json and headers, and check the checksums where there are any.

        Raises:
            CheckpointError: a file is missing or damaged.
            ValueError: the model is quantized in a way that can't be read.
        """
        folder = Path(path)
        config = read_config(folder)
        entry = pop_quantization(config)
        published = None if entry is None else read_quantization(entry)
        checkpoint = Checkpoint.from_directory(folder)
        if published is not None and published.checksums:
            checkpoint.check_checksums()
        ours = entry is not None and entry.get("quant_method") == METHOD
        return cls(folder, config, published, checkpoint, ours, read_model_config(folder))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of config.json, which 8-bit weights are decompressed to."""
        return self.model_config.dtype or torch.float32

    @property
    def rules(self) -> Rules:
        """Which layers are packed when the model is loaded, or may be when it is dense."""
        return (self.published or Sparse24Config(format="dense")).rules()

    def check(self, model: PreTrainedModel | None) -> None:
        """Check every tensor, without decoding it: its parts, and that it and no other is what the model needs.

        Args:
            model: the dense model of config.json; without one, only what the files themselves say is checked.

        Raises:
            CheckpointError: naming file and tensor.
        """
        weights = find_stored_weights(self.checkpoint.tensors)
        decoded = [weight for weight in weights.values() if not weight.plain]
        for weight in decoded:
            weight.check()
        if model is None:
            return
        check_sizes(model, self.checkpoint)
        check_complete(model, self.checkpoint, decoded, pooler=False)

    def skeleton(self, architecture: str | None = None) -> PreTrainedModel:
        """The model that config.json describes, dense and without weights.

        Args:
            architecture: the class to make instead of the one that was saved, if transformers has it for this config.

        Raises:
            CheckpointError: its architecture is no class of transformers.
        """
        config = copy.deepcopy(self.model_config)
        cls = model_class(config)
        if architecture is not None:
            config.architectures = [architecture]
            other = model_class(config)
            cls = other if other is not None and other.config_class is type(config) else cls
        if cls is None:
            raise CheckpointError(
                f"{self.path / CONFIG_NAME}: architectures={config.architectures} names no class of transformers, "
                "so its linear layers are unknown. Load the model with its own code and Sparse24Config, and save it."
            )
        return build_empty(cls, config, self.path)

    def packed_config(self, left_dense: list[str]) -> dict[str, Any]:
        """config.json of the packed model, whose layers are all packed but those named."""
        new = dict(self.config)
        if not names_dtype(new):
            new["dtype"] = str(self.checkpoint.dtype).removeprefix("torch.")
        entry = Sparse24Config(targets=["Linear"], ignore=left_dense, checksums=True).to_dict()
        return {**new, "quantization_config": entry}


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


def packed_specs(weight: StoredWeight, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Names and forms of the packed tensors of a weight."""
    rows, columns = weight.size()
    return {
        f"{weight.module}.compressed": TensorSpec(dtype, (rows, columns // 2)),
        f"{weight.module}.bitmask": TensorSpec(torch.uint8, (rows, mask_width(columns))),
        f"{weight.module}.shape": TensorSpec(torch.int64, (2, 1)),
    }


def packed_names(weight: StoredWeight, packed: PackedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a packed weight by the names that `packed_specs` gives them."""
    return {f"{weight.module}.{part}": tensor for part, tensor in packed._asdict().items()}


def packed_piece(weight: StoredWeight, dtype: torch.dtype) -> Piece:
    """A piece that packs one stored weight."""
    specs = packed_specs(weight, dtype)
    return Piece(weight.sources, specs, lambda: packed_names(weight, weight.read_packed(dtype)))


def dense_piece(weight: StoredWeight, dtype: torch.dtype) -> Piece:
    """A piece that unpacks, or rescales, one stored weight."""
    specs = {weight.name: TensorSpec(dtype, weight.size())}
    return Piece(weight.sources, specs, lambda: {weight.name: weight.read_dense(dtype)})


def replaced_piece(weight: StoredWeight, dtype: torch.dtype, new: StoredTensor) -> Piece:
    """A piece that writes `new`, as a dense tensor, in the place of a stored weight or another parameter."""
    specs = {weight.name: TensorSpec(dtype, new.shape)}
    return Piece(weight.sources, specs, lambda: {weight.name: new.read().to(dtype)})


def planned_piece(weight: PlannedWeight) -> Piece:
    """The piece for a weight that is planned to be packed or dense."""
    make = packed_piece if weight.action == "pack" else dense_piece
    return make(weight.stored, weight.stored.own_dtype(weight.dtype))


def layers_left_dense(model: PreTrainedModel, checkpoint: Checkpoint, packed: Iterable[str]) -> list[str]:
    """The linear layers that are not packed, by their name in the checkpoint, or in the model where they have none.

    Args:
        model: dense model.
        checkpoint: the source.
        packed: names in the model of the layers that are.
    """
    names = KeyNames(model)
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear} - set(packed)
    stored = {(names.parameter(name) or "").rpartition(".")[0]: name.rpartition(".")[0] for name in checkpoint.tensors}
    return sorted(stored.get(name, name) for name in dense)


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
    license: str | None = None,
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
        license: identifier of the license to name in README.md; None leaves it as it is.

    Raises:
        FileExistsError: `output` exists and is not empty.
        CheckpointError: a piece can't be made.
        OSError: it can't be written, as where the disk is full.
    """
    files = [source.path / CONFIG_NAME, *source.checkpoint.files]
    pipeline = sentence_files(str(source.path))
    job = {"source": file_states(files), "config": config, **job} | ({"license": license} if license else {})
    every = pieces + _copy_pieces(source.checkpoint, pieces)
    after = sum(spec.nbytes for piece in every for spec in piece.specs.values())
    stage = StagedFolder(output, job)
    with stage.opened():
        weight_map = _write_shards(source.checkpoint, every, stage.path, on_progress)
        names = set(weight_map.values()) | {CONFIG_NAME}
        if set(weight_map.values()) != {WEIGHTS_NAME}:
            index = {"metadata": {"total_size": after}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(stage.path / INDEX_NAME, json.dumps(index, indent=2) + "\n")
            names.add(INDEX_NAME)
        names |= _copy_other_files(source.path, stage.path, pipeline)
        if "quantization_config" in config:
            write_notice(stage.path)
        else:
            drop_notice(stage.path)
        if license is not None:
            set_license(stage.path, license)
        names |= {README_NAME} if (stage.path / README_NAME).exists() else set()
        write_text(stage.path / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
        stage.finish(names)
    return ConversionReport(stage.output, len(pieces), sum(map(_source_bytes, every)), after)


def _write_shards(
    checkpoint: Checkpoint, pieces: list[Piece], folder: Path, on_progress: OnProgress
) -> dict[str, str]:
    """Write the files of weights that are not there yet; returns the file of every tensor."""
    total = sum(map(_source_bytes, pieces))
    done, weight_map = 0, {}
    for file in checkpoint.files:
        own = [piece for piece in pieces if piece.sources[0].file == file]
        specs = {name: spec for piece in own for name, spec in piece.specs.items()}
        weight_map.update(dict.fromkeys(specs, file.name))
        if own and not (folder / file.name).exists():
            with ShardWriter(folder / file.name, specs) as writer:
                for piece in own:
                    for name, tensor in piece.make().items():
                        writer.write(name, tensor)
                    done += _source_bytes(piece)
                    on_progress(done, total)
        else:
            done += sum(map(_source_bytes, own))
            on_progress(done, total)
    return weight_map


def _source_bytes(piece: Piece) -> int:
    return sum(stored.nbytes for stored in piece.sources)


def file_states(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files, to tell whether they changed between two runs."""
    return [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _copy_other_files(source: Path, target: Path, pipeline: Mapping[str, Path]) -> set[str]:
    """Copy tokenizer, generation config and so on, but no weights and nothing hidden; returns the names copied.

    Nothing of an adapter that lies there, either: transformers would load a model with its config as that adapter.
    The folders of a sentence-transformers pipeline are copied whole: their weights are those of other modules.
    """
    names = set()
    for entry in source.iterdir():
        if entry.name == CONFIG_NAME or _is_left_behind(entry):
            continue
        names.add(entry.name)
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, ignore=_left_behind, dirs_exist_ok=True)
        else:
            shutil.copyfile(entry, target / entry.name)
    copy_files(pipeline, target)
    return names | {PurePosixPath(name).parts[0] for name in pipeline}


def _is_left_behind(path: Path) -> bool:
    if path.name.startswith(".") or path.name == ADAPTER_CONFIG_NAME or path.name.endswith(_WEIGHT_SUFFIXES):
        return True
    return (path / ADAPTER_CONFIG_NAME).exists()


def _left_behind(folder: str, names: list[str]) -> set[str]:
    """What of a folder is not copied, as `shutil.copytree` asks."""
    return {name for name in names if _is_left_behind(Path(folder, name))}


class StagedFolder:
    """The folder `.NAME.partial` beside the folder NAME to make. A run that was killed is taken up where it stopped.

    Raises:
        FileExistsError: a file or a folder that is not empty is at `output`, or another run is filling it.
    """

    def __init__(self, output: str | os.PathLike[str], job: dict[str, Any]) -> None:
        self.output = Path(output).absolute()
        check_new_folder(self.output)
        self.path = self.output.with_name(f".{self.output.name}.partial")
        self._named, self._job = Path(output), json.dumps(job, sort_keys=True, indent=1)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Where it is there, to be filled; an error of a full disk names the folder to make, and what is left."""
        kept = f"; what is complete stays in {str(self.path)!r} for the same run to go on with"
        with naming_full_disk(self._named, self.path, kept), sole_writer(self.path):
            if self._read_state() != self._job:
                for entry in self.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                write_text(self.path / _STATE_NAME, self._job)
            yield

    def _read_state(self) -> str | None:
        state = self.path / _STATE_NAME
        return state.read_text(encoding="utf-8") if state.is_file() else None

    def finish(self, names: set[str]) -> None:
        """Give the folder its name.

        Args:
            names: the files it is to have; what else there is was left by a run that was killed, and goes.
        """
        for entry in self.path.iterdir():
            if entry.name not in names | {_STATE_NAME}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.path / _STATE_NAME).unlink()
        os.replace(self.path, self.output)
