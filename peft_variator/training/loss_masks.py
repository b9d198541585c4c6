"""Which tokens and which predictions of a batch count, and where the predictions of a kind of model are.

Masks are pure functions of the batch; `None` means there is no padding.

A batch is what the model's forward gets, a mapping of argument names to tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Head, has_decoder, head_of, shifts_labels
from ..tuners.variator.attention_mask import last_tokens
from ..tuners.variator.forward_context import IGNORED_LABEL, next_token_labels


__all__ = [
    "CAUSAL",
    "EXAMPLES",
    "HIDDEN_KEYS",
    "IGNORED_LABEL",
    "Inputs",
    "Prediction",
    "batch_size",
    "decoder_tokens",
    "has_several_labels",
    "input_tokens",
    "labelled_tokens",
    "patch_tokens",
    "predicting_themselves",
    "predicting_tokens",
    "prediction_of",
    "stacks_of",
    "without_streams",
]

Inputs = Mapping[str, Any]


def batch_size(inputs: Inputs) -> int:
    """Number of examples in the batch: the first dimension of its first tensor."""
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim() > 0)


def _two_dimensional(name: str, mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; padding can only be told from a mask of shape (batch, length). "
            "Pass the 2-D mask and let the model derive others from it."
        )
    return mask.bool()


def input_tokens(inputs: Inputs) -> Tensor | None:
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


def patch_tokens(inputs: Inputs) -> Tensor | None:
    """Real patches of images of several shapes, bool of shape `(batch, patches)`; `None` where all are.

    Raises:
        ValueError: `pixel_attention_mask` is not 2-D.
    """
    if inputs.get("pixel_attention_mask") is not None:
        return _two_dimensional("pixel_attention_mask", inputs["pixel_attention_mask"])
    mask = inputs.get("patch_attention_mask")
    return None if mask is None else mask.flatten(1).bool()


def decoder_tokens(inputs: Inputs) -> Tensor | None:
    """Real tokens of the decoder of an encoder–decoder model, bool of shape `(batch, decoder length)`.

    Told by `decoder_attention_mask`, else by labels other than −100 (the decoder's position t predicts label t), else
    all of `decoder_input_ids`; a batch without any of them gives the decoder the encoder's tokens, as BART does.

    Raises:
        ValueError: `decoder_attention_mask` is not 2-D.
    """
    if inputs.get("decoder_attention_mask") is not None:
        return _two_dimensional("decoder_attention_mask", inputs["decoder_attention_mask"])
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():  # else of several classes
        return labels != IGNORED_LABEL
    if inputs.get("decoder_input_ids") is not None:
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)
    return input_tokens(inputs)


def predicting_tokens(inputs: Inputs) -> Tensor:
    """Positions of a causal model whose next-token prediction is used, bool of shape `(batch, length)`.

    With labels those right before a label other than −100; without labels the last real token only, whose prediction
    is what a prefill is run for.

    Raises:
        ValueError: the batch has no text.
    """
    told = inputs.get("labels") if inputs.get("shift_labels") is None else inputs["shift_labels"]
    labels = None if told is None else next_token_labels(inputs, (told.shape[0], told.shape[1]))
    return last_tokens(_require_text(inputs)) if labels is None else labels != IGNORED_LABEL


def predicting_themselves(inputs: Inputs) -> Tensor:
    """As `predicting_tokens`, of a model whose labels stand where they are predicted.

    Raises:
        ValueError: the batch has no text.
    """
    labels = inputs.get("labels")
    return last_tokens(_require_text(inputs)) if labels is None else labels != IGNORED_LABEL


def labelled_tokens(inputs: Inputs) -> Tensor:
    """Positions with a label of their own (no shift), else all real tokens; bool of shape `(batch, length)`.

    Without labels those of the decoder count where the batch has any for one.

    Raises:
        ValueError: the batch has neither labels nor text.
    """
    if inputs.get("labels") is None:
        real = decoder_tokens(inputs) if inputs.get("decoder_input_ids") is not None else None
        return _require_text(inputs) if real is None else real
    return inputs["labels"] != IGNORED_LABEL


def _require_text(inputs: Inputs) -> Tensor:
    real = input_tokens(inputs)
    if real is None:
        raise ValueError(
            f"The batch has no attention_mask, input_ids or inputs_embeds, only {', '.join(inputs)}, so it does not "
            "tell which predictions count. Pass one of them."
        )
    return real


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
    real = input_tokens(inputs)
    return None if real is None else real.unsqueeze(1).expand_as(logits)


def _device(inputs: Inputs) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


CAUSAL = Prediction(_logits, predicting_tokens)
UNSHIFTED = Prediction(_logits, predicting_themselves)
TOKENS = Prediction(_logits, labelled_tokens)
EXAMPLES = Prediction(_logits, _one_each)
SPANS = Prediction(_spans, _two_each, _real_positions)

PREDICTIONS: dict[Head, Prediction] = {
    "seq2seq": TOKENS,
    "causal": CAUSAL,
    "masked": TOKENS,
    "token-classification": TOKENS,
    "classification": EXAMPLES,
    "question-answering": SPANS,
}


def prediction_of(model: nn.Module) -> Prediction | None:
    """How to read the logits of a transformers model; `None` for a model without a known head.

    Args:
        model: the base model itself, not a wrapper.
    """
    head = head_of(model)
    if head == "causal" and not shifts_labels(model):
        # XLM's is the head of its masked language model, too, which is how it is used.
        return TOKENS if type(model).__name__ == "XLMWithLMHeadModel" else UNSHIFTED
    return None if head is None else PREDICTIONS[head]


def has_several_labels(problem: str | None, prediction: Prediction, inputs: Inputs) -> bool:
    """Whether an example has any number of labels, each given or not by itself, rather than one class.

    Args:
        problem: `problem_type` of the model's configuration.
        prediction: how its logits are read.
        inputs: a batch; where the configuration says nothing, transformers reads the kind of problem off its labels.
    """
    if prediction is not EXAMPLES or problem is not None:
        return problem == "multi_label_classification"
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and labels.dim() == 2 and labels.is_floating_point()


def without_streams(states: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states `(batch, length, dim)`; of a model with several for each token (Gemma 3n) side by side in `dim`.

    Args:
        states: as the model gives them.
        mask: real tokens, bool of shape `(batch, length)`, or `None`.
    """
    if mask is None or states.dim() != 4 or states.shape[1:3] != mask.shape:
        return states
    return states.movedim(0, 2).flatten(2)


# Where a model's output holds hidden states, and the tokens they belong to; of an encoder–decoder both last states
# count, as in Xiao et al. 2023 (https://arxiv.org/abs/2310.15724, section 3.3).
SINGLE_STACK: dict[str, Callable[[Any], Tensor | None]] = {"hidden_states": input_tokens}
TWO_STACKS: dict[str, Callable[[Any], Tensor | None]] = {
    "encoder_hidden_states": input_tokens,
    "decoder_hidden_states": decoder_tokens,
}
HIDDEN_KEYS = (*SINGLE_STACK, *TWO_STACKS)


def stacks_of(model: nn.Module) -> Mapping[str, Callable[[Any], Tensor | None]]:
    """The hidden states that a model returns, each with what tells its real tokens from a batch.

    Args:
        model: the base model itself, not a wrapper.
    """
    stacks = TWO_STACKS if has_decoder(model) else SINGLE_STACK
    main_input = getattr(model, "main_input_name", None)
    if main_input in ("input_features", "input_values"):
        return {key: _frames_of(model) if mask is input_tokens else mask for key, mask in stacks.items()}
    takes = inspect.signature(model.forward).parameters
    # What vision-language models call pixel_attention_mask is of pixels.
    if "patch_attention_mask" in takes or (main_input == "pixel_values" and "pixel_attention_mask" in takes):
        return dict.fromkeys(stacks, patch_tokens)
    return stacks


def _frames_of(model: nn.Module) -> Callable[[Any], Tensor | None]:
    """What tells the real frames of a model of sound, whose `attention_mask` is of samples or of finer frames."""

    def frames(inputs: Inputs) -> Tensor | None:
        if inputs.get("attention_mask") is None:
            return input_tokens(inputs)
        mask = _two_dimensional("attention_mask", inputs["attention_mask"])
        made: Any = getattr(model, "_get_feature_vector_attention_mask", None)
        lengths: Any = getattr(model, "_get_feat_extract_output_lengths", None)
        if made is not None and lengths is not None:
            # Of an adapter behind the encoder, which halves them again, no hidden states are returned.
            count = int(lengths(torch.tensor(mask.shape[1]), **_without_adapter(lengths)))
            return made(count, mask.long(), **_without_adapter(made)).bool()
        positions = getattr(model.config, "max_source_positions", None)
        if positions and mask.shape[1] % positions == 0:
            return mask[:, :: mask.shape[1] // positions]
        raise ValueError(
            f"attention_mask has {mask.shape[1]} positions, and nothing says which frames of {type(model).__name__} "
            "they are. Leave it out, so that all frames count, or give sounds of one length."
        )

    return frames


def _without_adapter(function: Callable[..., Any]) -> dict[str, bool]:
    return {"add_adapter": False} if "add_adapter" in inspect.signature(function).parameters else {}
