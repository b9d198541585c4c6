"""Checking whole checkpoint files beside the loading, and remembering those that passed and have not changed since.

A file that passed is remembered by a small record in the user's cache folder: what was expected of it, which file it
is (path, device, inode), its size and its times, and the same of other files that its checks read. The time of its
last change can't be set; it moves with every ordinary write, also where the time of modification is put back
afterwards. A file that its record fits exactly is not read for checks again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..files import cache_folder, replacing
from .checkpoint import BackgroundChecks, Checkpoint
from .compressed_tensors import find_stored_weights


__all__ = ["SWITCH", "FileChecks"]

SWITCH = "PEFT_VARIATOR_REMEMBER_CHECKS"
"""Environment variable: 0 checks every file at every load, and remembers none."""

_RECORD_NAME = "checked-{}.json"
_VERSION = 2  # counts up where more is checked, so that what an earlier package remembered is checked again
# Clocks of file systems are coarse: a write right after the checks might leave the time of one right before them.
_SETTLED_NANOSECONDS = 2_000_000_000
_VALID_SECONDS = 7 * 24 * 3600.0  # a disk may lose bits without a write


class FileChecks:
    """The checks of a checkpoint for which every byte is read: checksums, and the bitmasks of packed weights.

    They begin at once, in threads, and `finish` waits for them. Files that are remembered are passed over.

    Args:
        checkpoint: the files.
        checksums: whether every tensor has a checksum.

    Raises:
        CheckpointError: a weight has no part that it needs, or is stored in a format that can't be read.
    """

    def __init__(self, checkpoint: Checkpoint, checksums: bool) -> None:
        self._background = BackgroundChecks()
        # By what is expected: a save writes all checksums into every file, so that another file may change them.
        self._checks: dict[Path, dict[str, Callable[[], None]]] = {file: {} for file in checkpoint.files}
        self._others: dict[Path, set[Path]] = {file: set() for file in checkpoint.files}
        if checksums:
            for stored in checkpoint.tensors.values():
                expected = f"checksum of {stored.name} is {checkpoint.checksums.get(stored.name)}"
                self._checks[stored.file][expected] = partial(checkpoint.check_checksum, stored)
        for weight in find_stored_weights(checkpoint.tensors).values():
            if weight.matches_packed_layer:
                bitmask = weight.parts["bitmask"]
                self._checks[bitmask.file][f"bits of {bitmask.name}"] = weight.check
                self._others[bitmask.file] |= {part.file for part in weight.parts.values()} - {bitmask.file}
        self._before = {file: self._describe(file) for file, checks in self._checks.items() if checks}
        self._settled = {file for file, record in self._before.items() if _is_settled(record)}
        self._remembered = {file for file, record in self._before.items() if _is_remembered(record)}
        for file in self._before:
            if file not in self._remembered:
                self._start(file)

    def finish(self) -> None:
        """Wait for all of them, and remember the files that passed.

        Raises:
            CheckpointError: what the first check that failed found; it names file and tensor.
        """
        for file in self._remembered:
            if self._describe(file) != self._before[file]:  # it changed meanwhile
                self._start(file)
        self._background.finish()
        for file in self._settled - self._remembered:
            record = self._before[file]
            if record is not None and record == self._describe(file):
                _remember(record)

    def stop(self) -> None:
        """End the checks without an answer; nothing reads the files any more."""
        self._background.stop()

    def _start(self, file: Path) -> None:
        for check in self._checks[file].values():
            self._background.start(check)

    def _describe(self, file: Path) -> dict[str, Any] | None:
        """What the record of the file would say if it passed now; None where none is to be made."""
        if os.environ.get(SWITCH) == "0" or os.name != "posix":  # Windows keeps no time of the last change
            return None
        try:
            own, others = _identify(file), [_identify(other) for other in sorted(self._others[file])]
        except OSError:
            return None
        checks = hashlib.sha256(json.dumps(list(self._checks[file])).encode()).hexdigest()
        return {"version": _VERSION, "checks": checks, **own, "others": others}


def _identify(file: Path) -> dict[str, Any]:
    """Which file it is, and what moves when it is written."""
    path = os.path.realpath(file)
    found = os.stat(path)
    return {
        "path": path,
        "device": found.st_dev,
        "inode": found.st_ino,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _is_settled(record: dict[str, Any] | None) -> bool:
    files = [] if record is None else [record, *record["others"]]
    return bool(files) and all(time.time_ns() - each["ctime_ns"] > _SETTLED_NANOSECONDS for each in files)


def _is_remembered(record: dict[str, Any] | None) -> bool:
    """Whether the record is there, written by this user, not too long ago."""
    if record is None:
        return False
    try:
        file = _record_file(record)
        if not (_is_private(file.parent) and _is_private(file)) or _is_old(file):
            return False
        return bool(json.loads(file.read_text(encoding="utf-8")) == record)
    except (OSError, RuntimeError, ValueError):  # there is none, no home, or it is damaged
        return False


def _remember(record: dict[str, Any]) -> None:
    """Write the record, and take those away that are too old; where that is not possible, all is checked next time."""
    with suppress(OSError, RuntimeError):
        file = _record_file(record)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(file.parent):
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                temporary.chmod(0o600)
            for other in file.parent.glob(_RECORD_NAME.format("*")):
                if _is_old(other):
                    other.unlink(missing_ok=True)


def _record_file(record: dict[str, Any]) -> Path:
    return cache_folder() / _RECORD_NAME.format(hashlib.sha256(os.fsencode(record["path"])).hexdigest()[:32])


def _is_private(path: Path) -> bool:
    """Whether none but this user can have written it."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_old(file: Path) -> bool:
    return not 0 <= time.time() - file.stat().st_mtime < _VALID_SECONDS
