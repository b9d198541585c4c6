"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


__all__ = ["check_new_file", "check_new_folder", "new_folder", "replacing", "write_text"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, to write to; on success it takes the place of `path`, else it goes away.

    Missing parent folders are made. The temporary name ends like `path`, for libraries that read the format off it.

    Args:
        path: the file to write.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        temporary = Path(folder, target.name)
        yield temporary
        os.replace(temporary, target)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_new_folder(path: str | Path) -> None:
    """Raise unless a folder can be made at `path`: nothing is there, or an empty folder.

    Raises:
        FileExistsError: a file or a folder that is not empty is there.
        OSError: no folder can be made there.
    """
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"{str(target)!r} already exists and is not empty. Name another output folder, or remove this one first."
        )
    _check_parents(target)


def check_new_file(path: str | Path) -> None:
    """Raise unless a file can be written to `path`; one that is there would be replaced.

    Raises:
        OSError: a folder is at `path`, or no file can be made there.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder. Name a file in it.")
    _check_parents(Path(path))


def _check_parents(target: Path) -> None:
    """Find out before the work, not after it, that its result could not be written."""
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{str(target)!r} can't be written: {str(parent)!r} is a file. Name another output.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{str(target)!r} can't be written: {str(parent)!r} is not yours to write to.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, to fill; on success it gets the name `path`, else it goes away.

    A process that is killed leaves only the temporary folder, `.NAME.partial-*`.

    Args:
        path: the folder to make. Missing parents are made.

    Raises:
        FileExistsError: a file or a folder that is not empty is at `path`.
        OSError: no folder can be made there.
    """
    check_new_folder(path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
