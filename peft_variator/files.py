"""Writing files and folders whole or not at all, and finding out beforehand whether they can be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows, where what killed processes leave behind stays
    fcntl = None  # type: ignore[assignment]


__all__ = [
    "TABLE_SUFFIXES",
    "cache_folder",
    "check_data_name",
    "check_new_file",
    "check_new_folder",
    "is_of_full_disk",
    "naming_full_disk",
    "new_folder",
    "replacing",
    "replacing_folder",
    "replacing_with",
    "sole_writer",
    "write_text",
]

TEXT_SUFFIXES = frozenset({".txt", ".md"})
TABLE_SUFFIXES = frozenset({".csv", ".json", ".jsonl", ".ndjson", ".parquet", ".tab", ".tsv"})
"""Of files that hold texts in a column."""

# Temporary names are made of the first letters of the real one, which may itself be as long as a name can be.
PREFIX_LENGTH = 40
# A full disk, a quota, and a limit of a file's size; Windows has no quotas of that name.
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
# A temporary folder is locked right after it was made, and then renamed to say so; one that is not may still be new.
_LOCKED = "-locked"
_SURELY_LOCKED_SECONDS = 60.0


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, to write to; on success it takes the place of `path`, else it goes away.

    Missing parent folders are made. The temporary name ends like `path`, for libraries that read the format off it.
    A link stays one: the file that it leads to is replaced.

    Args:
        path: the file to write.
    """
    target = Path(os.path.realpath(path))
    with _temporary_folder(target) as folder:
        temporary = folder / target.name
        yield temporary
        os.replace(temporary, target)


@contextmanager
def replacing_with(path: str | Path, others: Mapping[str, bytes]) -> Iterator[Path]:
    """Like `replacing`, for a file that is of no use without others beside it: it is never with those of another.

    Where others have to change, the file at `path` is away while they do: a process that is killed meanwhile leaves
    none there. An error leaves all as it was.

    Args:
        path: the file to write.
        others: contents of the other files, by name; they are in the folder of `path`.
    """
    target, folder = Path(os.path.realpath(path)), Path(path).absolute().parent
    with _temporary_folder(target) as temporary:
        new = temporary / target.name
        yield new
        before = {name: _content(folder / name) for name in others}
        changed = {name: content for name, content in others.items() if before[name] != content}
        earlier = Path(tempfile.mkdtemp(dir=temporary)) / target.name
        try:
            if changed and target.exists():
                os.replace(target, earlier)
            for name, content in changed.items():
                _set_content(folder / name, content)
            os.replace(new, target)
        except BaseException:
            if new.exists():  # else all is done
                for name in changed:
                    _set_content(folder / name, before[name])
                if earlier.exists():
                    os.replace(earlier, target)
            raise


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _set_content(path: Path, content: bytes | None) -> None:
    """Give a file this content, whole; `None`: there is no file."""
    if content is None:
        path.unlink(missing_ok=True)
    elif _content(path) != content:
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_data_name(data: str) -> None:
    """Raise if `data` can only be a path, and nothing is there; else it may be a data set on the Hub.

    Raises:
        FileNotFoundError: nothing is at this path.
    """
    is_path = Path(data).suffix.lower() in TEXT_SUFFIXES | TABLE_SUFFIXES or data.startswith((".", "/", "~"))
    if is_path and not Path(data).exists():
        raise FileNotFoundError(f"There is no file {data!r}. Name a text file, or a data set on the Hub.")


def check_new_folder(path: str | Path) -> None:
    """Raise unless a folder can be made at `path`: nothing is there, or an empty folder.

    Raises:
        FileExistsError: a file or a folder that is not empty is there.
        OSError: no folder can be made there: it is the working folder, a link, a device or a mount point, its name is
            too long, or it can't be written to.
    """
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"{str(target)!r} already exists and is not empty. Name another output folder, or remove this one first."
        )
    _check_replaceable(target)
    if os.path.lexists(target) and not target.is_dir():
        raise FileExistsError(f"{str(target)!r} exists and is no folder. Name another output folder.")
    _check_parents(target)


def check_new_file(path: str | Path) -> None:
    """Raise unless a file can be written to `path`; one that is there would be replaced.

    Raises:
        OSError: a folder or a device is at `path`, or no file can be made there.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder. Name a file in it.")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{str(path)!r} is a device, which can't be replaced by a file. Name a file.")
    if os.path.ismount(target):
        raise OSError(f"{str(path)!r} is a mount point, which can't be replaced. Name another file.")
    _check_parents(target)


def _check_replaceable(target: Path) -> None:
    """Raise where only the last step, the new folder taking its name, would fail."""
    if target.is_symlink():
        raise FileExistsError(
            f"{str(target)!r} is a link, which can't be replaced by a folder. Name what it leads to."
        )
    if os.path.ismount(target):
        raise OSError(f"{str(target)!r} is a mount point, which can't be replaced. Name a folder in it.")
    if target.name in ("", "..") or (target.is_dir() and target.samefile(Path.cwd())):
        raise OSError(f"{str(target)!r} is the working folder or above it. Name a folder in it.")


def _check_parents(target: Path) -> None:
    """Find out before the work, not after it, that its result could not be written."""
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{str(target)!r} can't be written: {str(parent)!r} is a file. Name another output.")
    longest = os.pathconf(parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for name in target.absolute().relative_to(parent).parts:
        if len(os.fsencode(name)) > longest:
            raise OSError(f"The name {name!r} is too long: at most {longest} bytes are allowed. Shorten it.")
    try:
        # Rights alone don't tell: file systems may be full or read-only, and root may write anywhere. The file has no
        # name, where the system can do that, so that a kill leaves nothing.
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"1")
    except OSError as error:
        raise type(error)(
            f"{str(target)!r} can't be written: no file can be made in {str(parent)!r} ({error.strerror})"
        ) from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, to fill; on success it gets the name `path`, else it goes away.

    A process that is killed leaves only the temporary folder, `.NAME.partial-*`, which the next one that writes there
    takes away.

    Args:
        path: the folder to make. Missing parents are made.

    Raises:
        FileExistsError: a file or a folder that is not empty is at `path`.
        OSError: no folder can be made there.
    """
    check_new_folder(path)
    with _temporary_folder(Path(path)) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Like `new_folder`, and a folder that is at `path` stays there, whole, until the new one is.

    A process that is killed between the two leaves the earlier folder as `.NAME.partial-earlier`; the next one that
    writes there gives it its name again.

    Args:
        path: the folder to make or to replace.

    Raises:
        OSError: no folder can be made there.
    """
    target = Path(path)
    _check_replaceable(target)
    earlier = target.with_name(f"{_prefix(target)}partial-earlier")
    if earlier.is_dir() and not target.exists():
        os.replace(earlier, target)
    if not target.is_dir():
        check_new_folder(target)
    with _temporary_folder(target) as temporary:
        yield temporary
        if not target.is_dir():
            os.replace(temporary, target)
            return
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(target, earlier)
        try:
            os.replace(temporary, target)
        except BaseException:
            os.replace(earlier, target)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Make a folder where there is none, and hold it, so that no other run that holds it writes there meanwhile.

    Raises:
        FileExistsError: another one does.
        OSError: no folder can be made there.
    """
    os.makedirs(folder, exist_ok=True)
    try:
        lock = _lock(Path(folder))
    except BlockingIOError as error:
        raise FileExistsError(
            f"Another run is writing to {str(folder)!r}. Wait for its end, or name another output."
        ) from error
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def cache_folder() -> Path:
    """Where this package keeps what it can make again, for this user; it need not exist.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_variator"


def is_of_full_disk(error: BaseException) -> bool:
    """Whether an error came of a full disk, a quota or a limit of sizes, in whatever library it was raised."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # Libraries in Rust and C++ have the number, or what it means, in their text alone; torch says that a write failed.
    text = str(error)
    told = any(f"os error {number})" in text or os.strerror(number) in text for number in _FULL)
    return told or any(sign in text for sign in ("PytorchStreamWriter", "iostream error", "unexpected pos"))


@contextmanager
def naming_full_disk(target: str | Path, inside: str | Path, kept: str = "") -> Iterator[None]:
    """Have an error of a full disk say what could not be written, by the name that it was to have.

    Args:
        target: what is being written.
        inside: the folder that it is written in; a file elsewhere that did not fit keeps its own name.
        kept: what else to say.

    Raises:
        OSError: in the place of the error of a full disk, with its number and `target`.
    """
    try:
        yield
    except Exception as error:
        named = isinstance(error, OSError) and (error.filename2 or error.filename)  # of a copy the second
        elsewhere = isinstance(named, str | bytes) and not Path(os.fsdecode(named)).is_relative_to(inside)
        if not is_of_full_disk(error) or elsewhere:
            raise
        number = error.errno if isinstance(error, OSError) and error.errno is not None else errno.ENOSPC
        raise OSError(number, f"{os.strerror(number)}{kept}", str(target)) from error


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is gone at the end, unless it was given another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    made, lock = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}partial-", dir=target.parent)), None
    locked = Path(f"{made}{_LOCKED}")
    try:
        lock = _lock(made)
        temporary = made if lock is None else made.rename(locked)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        with naming_full_disk(target, temporary):
            yield temporary
    finally:
        _remove(made, locked)
        if lock is not None:
            os.close(lock)


def _remove(*folders: Path) -> None:
    """Remove folders that are there, also where Ctrl-C comes meanwhile."""
    try:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of killed processes: those of this name that were locked and that nobody holds now."""
    name = re.compile(re.escape(f"{_prefix(target)}partial-") + rf"[a-z0-9_]{{8}}({_LOCKED})?")
    with suppress(OSError):  # of others, or gone meanwhile: they take room and do no harm
        for folder in target.parent.iterdir():
            found = name.fullmatch(folder.name)
            if found and (found[1] or time.time() - folder.stat().st_mtime > _SURELY_LOCKED_SECONDS):
                with suppress(BlockingIOError):  # one that is being written
                    lock = _lock(folder)
                    if lock is not None:
                        shutil.rmtree(folder, ignore_errors=True)
                        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Hold a folder until the file descriptor is closed or the process ends; `None`: there are no locks here.

    Raises:
        BlockingIOError: another holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _prefix(target: Path) -> str:
    return f".{target.name[:PREFIX_LENGTH]}."


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
