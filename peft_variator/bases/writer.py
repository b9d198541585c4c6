"""Writing safetensors files tensor by tensor, so that memory does not grow with the file, each with its checksums."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .checkpoint import CHECKSUM_METADATA, DTYPE_NAMES, checksum


__all__ = ["ShardWriter", "TensorSpec", "spec_of"]


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
        self._file.seek(len(self._header()) + self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = error is None and not self._pending
        with self._file:
            if complete:
                self._file.seek(0)
                self._file.write(self._header())
                self._file.flush()
                os.fsync(self._file.fileno())
        if complete:
            os.replace(self._temporary, self._path)
            return
        self._temporary.unlink()
        if error is None:
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
