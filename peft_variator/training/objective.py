"""From a model and its training arguments to the terms of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .config import DistillationConfig
from .masks import decoder_tokens, real_tokens
from .predictions import CAUSAL, prediction_of
from .terms import HiddenTerm, LogitsTerm, TaskTerm, Term


__all__ = ["HIDDEN_KEYS", "build_terms", "stacks_of"]

# Where a model's output holds hidden states, and the tokens they belong to; of an encoder–decoder both last states
# count, as in Xiao et al. 2023 (https://arxiv.org/abs/2310.15724, section 3.3).
SINGLE_STACK = {"hidden_states": real_tokens}
TWO_STACKS = {"encoder_hidden_states": real_tokens, "decoder_hidden_states": decoder_tokens}
HIDDEN_KEYS = (*SINGLE_STACK, *TWO_STACKS)


def build_terms(
    model: nn.Module, args: DistillationConfig, label_names: list[str], mean_loss: Callable[[Any, Any], Tensor]
) -> dict[str, Term]:
    """The parts of the loss that have a weight above 0, by the name under which they are logged.

    Args:
        model: the base model itself, not a wrapper.
        args: weights of the parts.
        label_names: names of the labels in a batch; the first is counted.
        mean_loss: takes the model's output and a batch, gives the mean task loss over the batch's labels.

    Raises:
        ValueError: a part has a weight and the model has nothing it could be computed from.
    """
    terms: dict[str, Term] = {}
    if args.hidden_weight:
        for key, mask in stacks_of(model).items():
            term = HiddenTerm(args.hidden_weight, key, mask, last_only=args.hidden_loss == "last")
            terms[key.removesuffix("_states")] = term
    prediction = prediction_of(model)
    if args.logits_weight:
        if prediction is None:
            raise ValueError(
                f"logits_weight={args.logits_weight} needs a model with a known head, and {type(model).__name__} has "
                "none. Load it with one of transformers' AutoModelFor… classes, or set logits_weight=0."
            )
        terms["logits"] = LogitsTerm(args.logits_weight, prediction, args.temperature)
    if args.task_weight:
        if not label_names:
            raise ValueError(
                f"task_weight={args.task_weight} needs a model that takes labels, and {type(model).__name__} takes "
                "none. Load it with one of transformers' AutoModelFor… classes, or set task_weight=0."
            )
        terms["task"] = TaskTerm(args.task_weight, label_names[0], prediction is CAUSAL, mean_loss)
    return terms


def stacks_of(model: nn.Module) -> Mapping[str, Callable[[Any], Tensor | None]]:
    """The hidden states that a model returns, each with what tells its real tokens from a batch.

    Args:
        model: the base model itself, not a wrapper.
    """
    # Not told by `config.is_encoder_decoder`, which is also true of an encoder taken out of such a model.
    has_decoder = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return TWO_STACKS if has_decoder else SINGLE_STACK
