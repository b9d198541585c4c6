"""What the models around a stack tell about the tokens of its call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from .facts import CallFacts, StackKind
from .recorder import frames, inherited


__all__ = ["check_routers", "gather_facts"]


def gather_facts(stack: nn.Module, kind: StackKind, own: dict[str, Any]) -> CallFacts:
    """What is known about the tokens of a call that is about to run.

    Args:
        stack: the module that is called.
        kind: whether it is an encoder, causal, or a vision encoder.
        own: the arguments of its call.
    """
    arguments = inherited(stack) | own
    surrounding = [module for module, _ in frames()]
    image_ids = _image_ids(surrounding)
    past = arguments.get("past_key_values") if kind == "causal" else None
    by_embedding = kind == "causal" and image_ids and "input_ids" not in arguments
    return CallFacts(
        kind=kind,
        arguments=arguments,
        image_ids=image_ids,
        image_tokens=_image_tokens(image_ids) if by_embedding else None,
        shifted_labels=any(_has_language_head(module) for module in surrounding),
        patch_size=_patch_size(stack),
        pooled_pad_id=_pooled_pad_id(surrounding) if kind == "causal" else None,
        past_length=0 if past is None else int(past.get_seq_length()),
    )


def check_routers(stack: nn.Module, own: dict[str, Any]) -> None:
    """Raise if a call asks for the loss that balances the load of experts, with a mask: routers see merged rows.

    Args:
        stack: the module that is called.
        own: the arguments of its call.

    Raises:
        ValueError: it does.
    """
    asked = own.get("output_router_logits", getattr(getattr(stack, "config", None), "output_router_logits", False))
    if asked and own.get("attention_mask") is not None:
        raise ValueError(
            "output_router_logits=True with an attention_mask: with a Variator plugin the routers see merged rows, "
            "which the mask of the tokens does not fit, so the loss that balances the load cannot be computed. Set "
            "output_router_logits to False, in the call and in the model's config, or the ratio to 1."
        )


def _has_language_head(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _pooled_pad_id(surrounding: list[nn.Module]) -> int | None:
    """The id that the surrounding sequence classifier, if there is one, takes for padding."""
    classifiers = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    models = (module for module in surrounding if isinstance(module, PreTrainedModel))
    ids = (model.config.get_text_config().pad_token_id for model in models if type(model).__name__ in classifiers)
    return next((pad_id for pad_id in ids if pad_id is not None), None)


def _image_ids(surrounding: list[nn.Module]) -> tuple[int, ...]:
    """Ids that stand for image or video tokens in the text of the surrounding vision-language model."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = (getattr(module.config, name, None) for module in surrounding for name in names if hasattr(module, "config"))
    return tuple(sorted({token_id for token_id in ids if isinstance(token_id, int)}))


def _image_tokens(image_ids: tuple[int, ...]) -> Tensor | None:
    """Which of the embeddings that a vision-language model was called with are placeholders; `(batch, length)`."""
    for module, known in frames():
        embeddings = known.get("inputs_embeds")
        if embeddings is not None and isinstance(module, PreTrainedModel):
            with torch.no_grad():
                places = module.get_input_embeddings()(torch.tensor(image_ids, device=embeddings.device))
                return (embeddings.unsqueeze(2) == places.to(embeddings)).all(-1).any(-1)
    return None


def _patch_size(stack: nn.Module) -> tuple[int, int] | None:
    """Edge of a patch in pixels, `(height, width)`; `None` for stacks without patches."""
    size = getattr(getattr(stack, "config", None), "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
