"""The model of texts inside of what is served, and what it can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PreTrainedModel

from ..tuners.variator.layer import plugin_layers


__all__ = ["find_transformer", "has_plugin", "is_causal", "is_one_of", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """What a PeftModel was put around, with the plugin in it; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_transformer(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside of a PeftModel or a SentenceTransformer.

    Raises:
        ValueError: there is none, or it takes no text.
    """
    found = next((module for module in unwrap(model).modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no model of transformers in it. Give one that does.")
    if found.main_input_name != "input_ids":
        raise ValueError(f"{type(found).__name__} takes {found.main_input_name}; only models of text are served.")
    if is_one_of(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, found):
        raise ValueError(
            f"{type(found).__name__} is an encoder-decoder. Serve its encoder alone, e.g. a T5EncoderModel."
        )
    return found


def is_one_of(mapping: Mapping[Any, Any], model: PreTrainedModel) -> bool:
    """Whether a model has the head that an automatic class of transformers, whose mapping this is, would give it."""
    return type(model.config) in mapping and isinstance(model, mapping[type(model.config)])


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a model predicts next tokens, so that it is asked for a prefill."""
    return is_one_of(MODEL_FOR_CAUSAL_LM_MAPPING, model)


def has_plugin(model: nn.Module) -> bool:
    """Whether there is a Variator plugin whose ratio can be chosen."""
    return next(iter(plugin_layers(model)), None) is not None
