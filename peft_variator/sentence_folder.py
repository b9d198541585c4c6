"""Folders of sentence-transformers: what stands there beside the weights, and has to stand beside an adapter, too.

A folder of sentence-transformers is one of transformers with a list of modules, `modules.json`: the transformer, whose
path is the folder itself, then pooling and others, each with a folder for its own settings. The library is not needed
to keep them, nor to read how the model makes its embeddings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import file_exists, hf_hub_download, snapshot_download, try_to_load_from_cache

from .pooling import POOLINGS


__all__ = ["MODULES", "EmbeddingRecipe", "copy_files", "loading_class", "read_recipe", "sentence_files"]

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


def loading_class(folder: Path) -> str | None:
    """The class of sentence-transformers that loads a folder; `None`: it is none of its models.

    Before version 5 the library did not write it down, and had modules for `SentenceTransformer` alone.
    """
    if not (folder / MODULES).is_file():
        return None
    settings = _read(str(folder), "config_sentence_transformers.json") or {}
    return settings.get("model_type") or "SentenceTransformer"


@dataclass(frozen=True)
class EmbeddingRecipe:
    """How a model's hidden states become an embedding.

    Args:
        poolings: names in `POOLINGS`; the vectors of several are joined.
        normalize: whether it is scaled to length 1.
        max_length: most tokens of a text; `None`: as many as the model has positions.
        prompt: put before every text.
        truncate_dim: how many of its first entries an embedding has, cut after it was scaled; `None`: all.
        unknown: what the folder does with it besides, which only sentence-transformers can.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = True
    max_length: int | None = None
    prompt: str = ""
    truncate_dim: int | None = None
    unknown: tuple[str, ...] = ()


def read_recipe(model: str) -> EmbeddingRecipe:
    """What the folder of a model says about embeddings; the mean, normalised, where it says nothing.

    Args:
        model: folder, or name on the Hub of a model that was downloaded before. Nothing is downloaded.
    """
    modules = _read(model, MODULES)
    if not isinstance(modules, list):
        return EmbeddingRecipe()
    poolings: tuple[str, ...] = ()
    normalize, unknown, max_length = False, [], None
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        settings = _read(model, f"{module['path']}/config.json".lstrip("/")) or {}
        if kind == "Transformer":
            settings = _transformer_settings(model, module["path"])
            max_length = settings.get("max_seq_length")
            unknown += ["Transformer(do_lower_case=True)"] if settings.get("do_lower_case") else []
        elif kind == "Pooling":
            poolings = _poolings(settings)
            unknown += [] if settings.get("include_prompt", True) else ["Pooling(include_prompt=False)"]
            unknown += [name for name in poolings if name not in POOLINGS]
        elif kind == "Normalize":
            normalize = True
        else:
            unknown.append(kind)
    general = _read(model, "config_sentence_transformers.json") or {}
    return EmbeddingRecipe(
        poolings=poolings or ("mean",),
        normalize=normalize,
        max_length=max_length,
        prompt=(general.get("prompts") or {}).get(general.get("default_prompt_name")) or "",
        truncate_dim=general.get("truncate_dim"),
        unknown=tuple(unknown),
    )


def _transformer_settings(model: str, folder: str) -> Mapping[str, Any]:
    """What sentence-transformers keeps of a transformer: older files have the name of the architecture."""
    names = (f"{folder}/sentence_{kind}_config.json".lstrip("/") for kind in _ARCHITECTURES)
    return next((found for name in names if (found := _read(model, name)) is not None), {})


_ARCHITECTURES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")


def _poolings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The poolings of a folder; before version 5.5 of sentence-transformers there was one flag for each."""
    named = settings.get("pooling_mode")
    if named is not None:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for flag, name in _FLAGS.items() if settings.get(flag))


_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _read(model: str, name: str) -> Any:
    path: Any = Path(model, name)
    if model and not path.is_file() and not Path(model).exists() and model.count("/") <= 1:
        path = try_to_load_from_cache(model, name)
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))
