"""Folders of sentence-transformers: what stands there beside the weights, and has to stand beside an adapter, too.

A folder of sentence-transformers is one of transformers with a list of modules, `modules.json`: the transformer, whose
path is the folder itself, then pooling and others, each with a folder for its own settings. The library is not needed
to keep them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import file_exists, hf_hub_download, snapshot_download, try_to_load_from_cache


__all__ = ["MODULES", "copy_files", "sentence_files"]

MODULES = "modules.json"
# Settings of the whole and of the transformer, the latter under the names of today and of before.
SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json", "router_config.json")


def sentence_files(model: str) -> dict[str, Path]:
    """What sentence-transformers needs of a model beside the files of transformers, by the place in its folder.

    Args:
        model: folder or name on the Hub.

    Returns:
        dict[str, Path]: nothing where it is no model of sentence-transformers.

    Raises:
        ValueError: `modules.json` is no list of modules, or names a folder outside of its own.
    """
    listed = _find_list(model)
    if listed is None:
        return {}
    folders = _module_folders(listed)
    root = Path(model)
    if not root.is_dir():
        patterns = [MODULES, *SETTINGS, *(f"{folder}/*" for folder in folders)]
        root = Path(snapshot_download(model, allow_patterns=patterns))
    found = {MODULES: root / MODULES}
    for pattern in SETTINGS:
        found |= {path.name: path for path in sorted(root.glob(pattern))}
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return found


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to their places in a folder, with the folders that they are in."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _find_list(model: str) -> Path | None:
    if Path(model).is_dir():
        path = Path(model, MODULES)
        return path if path.is_file() else None
    try:
        known = isinstance(try_to_load_from_cache(model, MODULES), str)
        # `file_exists` asks once, where a download that the Hub does not answer is tried for half a minute.
        return Path(hf_hub_download(model, MODULES)) if known or file_exists(model, MODULES) else None
    except Exception:  # there is none, as far as can be seen; offline the HTTP client has errors of its own
        return None


def _module_folders(listed: Path) -> list[str]:
    """The folders of the modules but the one that is the whole folder."""
    try:
        folders = [module["path"] for module in json.loads(listed.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{listed} is no list of modules as sentence-transformers writes it ({type(error).__name__}: {error}). "
            "Save the model with it once more."
        ) from error
    for folder in folders:
        if not isinstance(folder, str) or PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise ValueError(f"{listed} names the folder {folder!r}, which has to be one inside of its own.")
    return [folder for folder in folders if folder not in ("", ".")]
