"""Models as transformers saved them: which class wrote a checkpoint, and loading it with all of its weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


__all__ = ["check_model_name", "load_whole", "model_class"]

_POOLER = re.compile(r"(^|\.)pooler\.")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that wrote a checkpoint, by its config's `architectures`; None if there is none."""
    for name in config.architectures or ():
        if name in dir(transformers):
            return getattr(transformers, name)
    return None


def check_model_name(name: str) -> None:
    """Raise if `name` can only be a path, and nothing is there; transformers would take it for a name on the Hub.

    Raises:
        FileNotFoundError: nothing is at this path.
    """
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/")
    if is_path and not Path(name).exists():
        raise FileNotFoundError(f"There is no folder {name!r}. Name a folder with a model, or a model on the Hub.")


def load_whole(automatic: Any, name: str, *, pooler: bool = True, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained` that draws no weights at random.

    Args:
        automatic: a model class of transformers, or an automatic one.
        name: folder, or name on the Hub.
        pooler: whether a pooler counts; checkpoints with another head lack it, and hidden states don't need it.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks weights.
    """
    loaded, info = automatic.from_pretrained(name, output_loading_info=True, **kwargs)
    missing = sorted(key for key in info["missing_keys"] if pooler or not _POOLER.search(key))
    if missing:
        first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ValueError(
            f"{name!r} does not hold all weights of a {type(loaded).__name__}: {first} are missing and would be "
            "random. It may have been saved with another head, or in another format: convert it first."
        )
    return loaded
