"""Which tokens and which predictions of a batch count. Pure functions of the batch; `None` means there is no padding.

A batch is what the model's forward gets, a mapping of argument names to tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..tuners.variator.forward_context import IGNORED_LABEL, next_token_labels


__all__ = ["batch_size", "decoder_tokens", "labelled_tokens", "last_tokens", "predicting_tokens", "real_tokens"]


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of examples in the batch: the first dimension of its first tensor."""
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0)


def _two_dimensional(name: str, mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; padding can only be told from a mask of shape (batch, length). "
            "Pass the 2-D mask and let the model derive others from it."
        )
    return mask.bool()


def real_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Real tokens of the (encoder) input, bool of shape `(batch, length)`; `None` for inputs without tokens (images).

    Raises:
        ValueError: `attention_mask` is not 2-D.
    """
    if inputs.get("attention_mask") is not None:
        return _two_dimensional("attention_mask", inputs["attention_mask"])
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            tokens = inputs[name]
            return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return None


def decoder_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Real tokens of the decoder of an encoder–decoder model, bool of shape `(batch, decoder length)`.

    Told by `decoder_attention_mask`, else by labels other than −100 (the decoder's position t predicts label t), else
    all of `decoder_input_ids`; a batch without any of them gives the decoder the encoder's tokens, as BART does.

    Raises:
        ValueError: `decoder_attention_mask` is not 2-D.
    """
    if inputs.get("decoder_attention_mask") is not None:
        return _two_dimensional("decoder_attention_mask", inputs["decoder_attention_mask"])
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == 2:
        return labels != IGNORED_LABEL
    if inputs.get("decoder_input_ids") is not None:
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)
    return real_tokens(inputs)


def last_tokens(real: Tensor) -> Tensor:
    """The last real token of every sequence, on either side of the padding.

    Args:
        real: bool, shape `(batch, length)`.

    Returns:
        Tensor: bool, shape `(batch, length)`, at most one `True` a row.
    """
    return real & (real.flip(1).cumsum(1).flip(1) == 1)


def predicting_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Positions of a causal model whose next-token prediction is used, bool of shape `(batch, length)`.

    With labels those right before a label other than −100; without labels the last real token only, whose prediction
    is what a prefill is run for.

    Raises:
        ValueError: the batch has no text.
    """
    told = inputs.get("labels") if inputs.get("shift_labels") is None else inputs["shift_labels"]
    labels = None if told is None else next_token_labels(inputs, (told.shape[0], told.shape[1]))
    return last_tokens(_require_text(inputs)) if labels is None else labels != IGNORED_LABEL


def labelled_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Positions with a label of their own (no shift), else all real tokens; bool of shape `(batch, length)`.

    Raises:
        ValueError: the batch has neither labels nor text.
    """
    if inputs.get("labels") is None:
        return _require_text(inputs)
    return inputs["labels"] != IGNORED_LABEL


def _require_text(inputs: Mapping[str, Any]) -> Tensor:
    real = real_tokens(inputs)
    if real is None:
        raise ValueError(
            f"The batch has no attention_mask, input_ids or inputs_embeds, only {', '.join(inputs)}, so it does not "
            "tell which predictions count. Pass one of them."
        )
    return real
