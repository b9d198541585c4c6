"""Which class of transformers a checkpoint was saved from."""

from __future__ import annotations

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


__all__ = ["model_class"]


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that wrote a checkpoint, by its config's `architectures`; None if there is none."""
    for name in config.architectures or ():
        if name in dir(transformers):
            return getattr(transformers, name)
    return None
