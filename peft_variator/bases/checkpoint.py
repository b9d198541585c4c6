"""safetensors checkpoints tensor by tensor: what is in them, whether it is whole, and writing them piece by piece."""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from ..field_types import shown
from ..model_files import CheckpointError, read_fields


try:  # the same numbers, five times as fast; not built for every processor
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32


__all__ = [
    "CHECKSUM_METADATA",
    "DTYPE_NAMES",
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "BackgroundChecks",
    "Checkpoint",
    "ShardWriter",
    "StoredTensor",
    "TensorSpec",
    "checksum",
    "read_index",
    "spec_of",
]

DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
"""torch dtype -> what safetensors calls it."""
_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CHECKSUM_METADATA = "crc32"
"""Key of the safetensors metadata that holds the checksums of a file's tensors, as JSON {tensor name: checksum}."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Args:
        name: its key.
        file: the safetensors file it is in.
        dtype: its dtype.
        shape: its shape.
        offset: where in the file its bytes begin.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Its values. The memory is that of the file: it is read when touched, and given back with the tensor."""
        # Not through safetensors, which parses the whole header each time a file is opened, and keeps every page that
        # was touched while it stays open.
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        if self.nbytes <= mmap.PAGESIZE:  # less work than mapping it
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                values = torch.frombuffer(bytearray(file.read(self.nbytes)), dtype=torch.uint8)
                return values.view(self.dtype).view(self.shape)
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            length = self.offset + self.nbytes - start
            region = mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_COPY)
        values = torch.frombuffer(region, dtype=torch.uint8, offset=self.offset - start, count=self.nbytes)
        if self.offset % self.dtype.itemsize:
            values = values.clone()  # written by someone who did not align it
        return values.view(self.dtype).view(self.shape)

    def __str__(self) -> str:
        return f"{self.file}, tensor {self.name}"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint's files, by name, and the checksums that the files give."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    checksums: dict[str, str]

    @classmethod
    def from_files(cls, files: Iterable[str | os.PathLike[str]]) -> Checkpoint:
        """Read the headers of safetensors files.

        Raises:
            CheckpointError: a file is missing, is no whole safetensors file, or holds a tensor that another one does.
        """
        paths = tuple(Path(file) for file in files)
        tensors: dict[str, StoredTensor] = {}
        checksums: dict[str, str] = {}
        for path in paths:
            if path.suffix != ".safetensors":
                raise CheckpointError(
                    f"{path} is not a safetensors file. Load the model and save it with save_pretrained first."
                )
            header, start = _read_header(path)
            checksums.update(_read_checksums(path, header.pop("__metadata__", None)))
            for name, entry in header.items():
                if name in tensors:
                    raise CheckpointError(f"{path}: tensor {name} is also in {tensors[name].file}.")
                if entry["dtype"] not in str_to_torch_dtype:
                    raise CheckpointError(f"{path}, tensor {name}: dtype {entry['dtype']} can't be read.")
                dtype, offset = str_to_torch_dtype[entry["dtype"]], start + entry["data_offsets"][0]
                tensors[name] = StoredTensor(name, path, dtype, tuple(entry["shape"]), offset)
        return cls(paths, tensors, checksums)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers of the checkpoint in a directory, one file or sharded with an index.

        Where both are there it is the one file, as for `from_pretrained`.

        Raises:
            CheckpointError: there is no safetensors checkpoint, or index and files disagree.
        """
        folder = Path(directory)
        index = folder / INDEX_NAME
        if (folder / WEIGHTS_NAME).exists():
            return cls.from_files([folder / WEIGHTS_NAME])
        if not index.exists():
            raise CheckpointError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
        weight_map = read_index(index)
        checkpoint = cls.from_files(folder / name for name in sorted(set(weight_map.values())))
        for name, file in weight_map.items():
            if name not in checkpoint.tensors or checkpoint.tensors[name].file.name != file:
                raise CheckpointError(f"{index}: tensor {name} is not in {file}. The checkpoint is incomplete.")
        return checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first tensor in one that models are kept in; float32 where there is none."""
        return next((stored.dtype for stored in self.tensors.values() if stored.dtype in _MODEL_DTYPES), torch.float32)

    def check_checksums(self) -> None:
        """Read every tensor and compare it with its checksum.

        Raises:
            CheckpointError: a tensor has no checksum or another one; the message names file and tensor.
        """
        checks = BackgroundChecks()
        for stored in self.tensors.values():
            checks.start(self.check_checksum, stored)
        checks.finish()

    def check_checksum(self, stored: StoredTensor) -> None:
        """`check_checksums` for one tensor."""
        if stored.name not in self.checksums:
            raise CheckpointError(f"{stored} has no checksum, but config.json says that every tensor has one.")
        actual = checksum(stored.read())
        if self.checksums[stored.name] != actual:
            raise CheckpointError(
                f"{stored}: its values do not match their checksum ({actual}, expected "
                f"{self.checksums[stored.name]}). The file is damaged; copy or download it again."
            )


class BackgroundChecks:
    """Checks that run in threads beside what is loaded, and that must have ended before anyone uses it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1))
        self._running: list[Future[None]] = []
        # Where loading fails in code of others, no one stops them.
        self._abandoned = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def start(self, check: Callable[..., None], *arguments: Any) -> None:
        """Run `check(*arguments)` when a thread is free."""
        self._running.append(self._pool.submit(check, *arguments))

    def finish(self) -> None:
        """Wait for all of them; raises what the first one that failed did, in the order in which they were started."""
        try:
            for check in self._running:
                check.result()
        finally:
            self.stop()

    def stop(self) -> None:
        """Drop those that have not begun, and wait for the others: no thread reads the files any more.

        Whoever cuts off a file that is mapped into memory would kill the process that reads it (SIGBUS).
        """
        self._abandoned.detach()
        self._pool.shutdown(wait=True, cancel_futures=True)


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's dtype, shape and bytes, in eight hexadecimal digits."""
    start = crc32(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{crc32(data.numpy().data, start):08x}"


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where it ends; safetensors has found that it fits the file."""
    try:
        with safe_open(file, framework="pt"), file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            return json.loads(handle.read(length)), 8 + length
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as a safetensors file: {error}") from error


def _read_checksums(file: Path, metadata: dict[str, str] | None) -> dict[str, str]:
    text = (metadata or {}).get(CHECKSUM_METADATA)
    try:
        checksums = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the checksums in its metadata are not JSON: {shown(error)}") from error
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{file}: the checksums in its metadata are a {type(checksums).__name__}, not a dict.")
    return checksums


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of a checkpoint's index: tensor -> name of the file beside the index that holds it.

    Raises:
        CheckpointError: it is no such index.
    """
    files = read_fields(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{index} is no index with a weight_map from names of tensors to names of files.")
    for name, file in files.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name} is in {file!r}, which is not a file beside the index.")
    return files


class TensorSpec(NamedTuple):
    """What has to be known of a tensor before it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(tensor: Tensor) -> TensorSpec:
    """Dtype and shape of a tensor."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


class ShardWriter:
    """A safetensors file of known content, whose tensors are written in any order.

    A context manager: the file appears under its name when all tensors are written, and not otherwise. `safetensors`
    itself writes a file from tensors that are all in memory. The format: eight bytes with the length of the header,
    the header as JSON, the tensors' bytes (https://github.com/huggingface/safetensors#format).

    Args:
        path: the file. A temporary one beside it, with `.partial` added to the name, is written first.
        specs: name -> dtype and shape of every tensor.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._path, self._temporary = path, path.with_name(path.name + ".partial")
        # Wide dtypes first, as safetensors itself does: every tensor then starts on a multiple of its item size.
        self._specs = dict(sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        self._checksums = dict.fromkeys(sorted(specs), "0" * 8)  # as long as the real ones
        self._pending = set(specs)
        self._offsets: dict[str, int] = {}
        offset = 0
        for name, spec in self._specs.items():
            self._offsets[name] = offset
            offset += spec.nbytes
        self._data_start = len(self._header())
        self._file: BinaryIO

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        self._file.write(self._header())
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: it has another dtype or shape than was announced.
        """
        if spec_of(tensor) != self._specs[name]:
            raise ValueError(f"{name} is {spec_of(tensor)}, but {self._specs[name]} was announced for {self._path}.")
        self._checksums[name] = checksum(tensor)
        self._pending.discard(name)
        self._file.seek(self._data_start + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = False
        try:
            with self._file:
                if error is None and not self._pending:
                    self._file.seek(0)
                    self._file.write(self._header())
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    complete = True
        finally:  # closing writes what is left, which may fail
            if not complete:
                self._temporary.unlink()
        if complete:
            os.replace(self._temporary, self._path)
        elif error is None:
            raise ValueError(f"{sorted(self._pending)[0]} of {self._path} was announced and not written.")

    def _header(self) -> bytes:
        """Length and JSON, padded to a multiple of eight; as long before the checksums are known as after."""
        entries = {
            name: {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [self._offsets[name], self._offsets[name] + spec.nbytes],
            }
            for name, spec in self._specs.items()
        }
        metadata = {"format": "pt", CHECKSUM_METADATA: json.dumps(self._checksums)}
        text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
