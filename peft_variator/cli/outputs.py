"""Where commands write JSON and pictures: found out before the work that a result could not be written."""

from __future__ import annotations

from pathlib import Path

from ..files import check_new_file
from ..profiling import check_plotting


__all__ = ["check_outputs"]


def check_outputs(json: Path | None, png: Path | None) -> None:
    """Raise unless what `--json` and `--png` name can be written.

    Raises:
        ImportError: `png` is given and matplotlib is not installed.
        OSError: a folder is there, or no file can be made there.
        ValueError: the name of a picture does not end in `.png`.
    """
    for name, path in {"--json": json, "--png": png}.items():
        if path is not None:
            _check(name, path)
    if png is not None:
        if png.suffix.lower() != ".png":
            raise ValueError(f"--png is {str(png)!r}; the name has to end in .png, as the picture is one.")
        check_plotting()


def _check(name: str, path: Path) -> None:
    try:
        check_new_file(path)
    except OSError as error:
        raise type(error)(f"{name}: {error}") from error
