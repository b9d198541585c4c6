"""Saving a model to a folder that is whole or not there."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from ..files import new_folder


__all__ = ["save_base"]


def save_base(model: PreTrainedModel, output: str | os.PathLike[str], **kwargs: Any) -> None:
    """`model.save_pretrained`, into a new folder that appears under its name when all of it is written.

    `save_pretrained` itself writes one file after the other into the folder with its final name. A process that is
    killed meanwhile leaves a folder that no one can load; here it leaves one called `.NAME.partial-…`.

    Args:
        model: a packed model, or any other.
        output: the folder to make.
        kwargs: for `save_pretrained`.

    Raises:
        FileExistsError: `output` exists and is not empty.
    """
    with new_folder(os.fspath(output)) as folder:
        model.save_pretrained(folder, **kwargs)
