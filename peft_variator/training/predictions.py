"""What the head of a model predicts: where its logits are, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .masks import batch_size, labelled_tokens, predicting_tokens, real_tokens


__all__ = ["Prediction", "prediction_of"]

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """How to read the logits of a kind of model.

    Args:
        logits: takes the model's output, gives logits of shape `(batch, ..., classes)`.
        mask: takes a batch, gives the predictions that count, bool of shape `(batch, ...)`.
        classes: takes a batch and the logits, gives the classes that exist, bool of the logits' shape.
    """

    logits: Callable[[Any], Tensor]
    mask: Callable[[Inputs], Tensor]
    classes: Callable[[Inputs, Tensor], Tensor | None] = lambda inputs, logits: None


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"]


def _one_each(inputs: Inputs) -> Tensor:
    return torch.ones(batch_size(inputs), dtype=torch.bool, device=_device(inputs))


def _spans(outputs: Any) -> Tensor:
    """Logits of the start and the end of an answer, distributions over positions; shape `(batch, 2, length)`."""
    return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)


def _two_each(inputs: Inputs) -> Tensor:
    return torch.ones(batch_size(inputs), 2, dtype=torch.bool, device=_device(inputs))


def _real_positions(inputs: Inputs, logits: Tensor) -> Tensor | None:
    real = real_tokens(inputs)
    return None if real is None else real.unsqueeze(1).expand_as(logits)


def _device(inputs: Inputs) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


CAUSAL = Prediction(_logits, predicting_tokens)
TOKENS = Prediction(_logits, labelled_tokens)
EXAMPLES = Prediction(_logits, _one_each)
SPANS = Prediction(_spans, _two_each, _real_positions)

# transformers' own tables of model classes. A class of several tables (BERT with a causal head) is read by the first.
PREDICTIONS = (
    (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, TOKENS),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CAUSAL),
    (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, CAUSAL),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, TOKENS),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, TOKENS),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, EXAMPLES),
    (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, EXAMPLES),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, SPANS),
)


def prediction_of(model: nn.Module) -> Prediction | None:
    """How to read the logits of a transformers model; `None` for a model without a known head.

    Args:
        model: the base model itself, not a wrapper.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    names = {cls.__name__ for cls in type(model).__mro__}
    found = next((prediction for table, prediction in PREDICTIONS if names & _class_names(table)), None)
    # A vision-language model over an encoder–decoder predicts label t at position t, unshifted.
    return TOKENS if found is CAUSAL and model.config.is_encoder_decoder else found


def _class_names(table: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for entry in table.values():
        names.update((entry,) if isinstance(entry, str) else entry)
    return names
