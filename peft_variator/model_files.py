"""What a model's folder or its name on the Hub holds, configuration and tokenizer; errors name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .field_types import shown


__all__ = [
    "ADAPTER_CONFIG_NAME",
    "CONFIG_NAME",
    "CheckpointError",
    "adapter_base",
    "check_model_name",
    "check_reachable",
    "check_vocabulary",
    "download_hint",
    "load_tokenizer",
    "read_config",
    "read_fields",
    "read_model_config",
]


CONFIG_NAME = "config.json"


ADAPTER_CONFIG_NAME = "adapter_config.json"


# Made without files, one of T5 has a word: the mark of a space.
FEWEST_WORDS = 2


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or does not hold what it says; the message names the file and what is in it."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a model folder's config.json.

    Raises:
        CheckpointError: there is none, as the folder holds an adapter, say; or as for `read_fields`.
    """
    if (folder / CONFIG_NAME).is_file():
        return read_fields(folder / CONFIG_NAME)
    if not folder.is_dir():
        what = f"{str(folder)!r} is a file" if folder.exists() else f"there is no folder {str(folder)!r}"
        raise CheckpointError(
            f"{folder / CONFIG_NAME} can't be read: {what}. Name the folder of a model.{download_hint(folder)}"
        )
    base = adapter_base(folder)
    if base is None:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        which = f"Name the folder of a model{', ' if inside else ''}{' or '.join(map(repr, inside[:3]))}."
        raise CheckpointError(f"{folder / CONFIG_NAME} can't be read: it is missing. {which}")
    raise CheckpointError(f"{str(folder)!r} holds an adapter and no model. Name its base model{base}.")


def download_hint(path: str | os.PathLike[str]) -> str:
    """For what is no path here, but may be a name on the Hub: how to have it in a folder; `""` for others."""
    parts = Path(path).parts
    if Path(path).exists() or len(parts) != 2 or str(path).startswith((".", "~", os.sep)):
        return ""
    return f" One on the Hub has to be fetched first: hf download {path} --local-dir {parts[-1]}"


def adapter_base(folder: str | os.PathLike[str]) -> str | None:
    """For a folder with an adapter alone, `", 'the name of its base'"`, or `""` where it names none; else None."""
    if not Path(folder, ADAPTER_CONFIG_NAME).is_file() or Path(folder, CONFIG_NAME).is_file():
        return None
    name = read_fields(Path(folder, ADAPTER_CONFIG_NAME)).get("base_model_name_or_path")
    return f", {shown(name)}" if name else ""


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file that holds an object.

    Raises:
        CheckpointError: it can't be read, is no JSON (or nested too deeply, or with numbers too long, to be read), or
            holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {shown(error)}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds {shown(fields)}, which is a {type(fields).__name__} and no fields.")
    return fields


def read_model_config(model: str | os.PathLike[str], **hub: Any) -> PreTrainedConfig:
    """The configuration of a model as transformers reads it.

    Args:
        model: a folder with a config.json, the path of such a file, or a model's name on the Hub.
        hub: for `AutoConfig.from_pretrained`: revision, token and so on.

    Raises:
        CheckpointError: it is no configuration of a model that transformers knows, or a field has a value of another
            type; the message names the file.
        OSError: there is no such file, folder or model.
    """
    check_reachable(str(model), **hub)
    source: Path | str = str(model)
    if not hub.get("subfolder") and (Path(model).is_dir() or Path(model).is_file()):
        if Path(model).is_file() and Path(model).suffix != ".json":
            raise CheckpointError(f"{str(model)!r} is a file. Name the folder of a model, or its {CONFIG_NAME}.")
        source = Path(model) / CONFIG_NAME if Path(model).is_dir() else Path(model)
        _check_fields(source, read_config(Path(model)) if Path(model).is_dir() else read_fields(source))
    try:
        return AutoConfig.from_pretrained(model, **hub)
    except OSError:
        raise  # not there, or the Hub can't be reached: transformers says what to do
    # what a config raises at a value of another kind is up to each model
    except Exception as error:
        raise CheckpointError(f"{source} describes no model that transformers can read: {shown(error)}") from error


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Raise where transformers would read a value of another type as if it were right, or fail without naming it."""
    architectures = fields.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(f"{path}: architectures={shown(architectures)} is no list of names of classes.")
    for name in ("dtype", "torch_dtype"):
        dtypes = fields.get(name)
        for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:  # a dict: one for each sub-model
            known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
            if dtype is not None and not known:
                raise CheckpointError(
                    f"{path}: {name}={shown(dtypes)} is no name of a torch dtype, such as 'bfloat16'."
                )


def check_model_name(name: str) -> None:
    """Raise if `name` can only be a path, and nothing is there; transformers would take it for a name on the Hub.

    Raises:
        FileNotFoundError: nothing is at this path.
    """
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/")
    if is_path and not Path(name).exists():
        raise FileNotFoundError(f"There is no folder {name!r}. Name a folder with a model, or a model on the Hub.")


def check_reachable(name: str, file: str = CONFIG_NAME, **hub: Any) -> None:
    """Raise unless a model or an adapter is a folder, is in the Hub's cache, or the Hub answers.

    It is asked once: the libraries that load it would try for a minute or more before they say that it does not.

    Args:
        name: the folder, or the name on the Hub.
        file: what it has to have; whether the Hub has it, is not looked at.
        hub: as for `from_pretrained`: revision, token and so on.

    Raises:
        OSError: there is no such folder, nothing of that name is in the cache, and the Hub can't be reached.
    """
    check_model_name(name)
    if Path(name).exists() or hub.get("local_files_only"):
        return
    path = "/".join(filter(None, (hub.get("subfolder"), file)))
    revision, token = hub.get("revision"), hub.get("token")
    try:
        if not isinstance(try_to_load_from_cache(name, path, hub.get("cache_dir"), revision), str):
            get_hf_file_metadata(hf_hub_url(name, path, revision=revision), token=token)
    except (HfHubHTTPError, ValueError):
        pass  # the Hub has answered, or no repository can have this name: who loads it says so
    except Exception as error:  # offline, or not to be reached: the HTTP client has errors of its own
        raise OSError(
            f"{name!r} is no folder here and not in the Hub's cache, and the Hub can't be reached ({error}). Name a "
            f"folder, or fetch it where there is a network: hf download {name}"
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: folder, or name on the Hub.

    Raises:
        ValueError: it has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    # which files are missing, transformers says in many ways, of converters that it lacks, too
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} has no tokenizer that can be read: {shown(error)}") from error
    check_vocabulary(tokenizer, name)
    return tokenizer


def check_vocabulary(processor: Any, name: str) -> None:
    """Raise where transformers has made a tokenizer without the model's files: all words are unknown to it.

    Args:
        processor: a tokenizer, or a processor that may have one.
        name: the model that it is of.

    Raises:
        ValueError: the tokenizer has special tokens and no others.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < FEWEST_WORDS:
        raise ValueError(
            f"{name!r} has no tokenizer: without its files transformers makes a {type(tokenizer).__name__} to which "
            "every word is unknown. Save the model's tokenizer beside it: tokenizer.save_pretrained(folder)."
        )
