"""Which positions of a call have a prediction that is used, and so must not see later tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .facts import CallFacts
from .masks import last_tokens, real_tokens, single_mask


__all__ = ["labels_of", "used_predictions", "uses_every_prediction"]


def used_predictions(facts: CallFacts, real: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Positions of a causal model whose own prediction is used, shape `(batch, length)`.

    They come from the labels in training (position j - 1 where label j is not -100), else from `logits_to_keep`,
    which generation sets; a plain call uses the prediction of the last real token only, and a sequence classifier also
    that of the last token which is no padding by its id.
    """
    used = torch.zeros(shape, dtype=torch.bool, device=device)
    labels, kept_logits = labels_of(facts, shape), facts.arguments.get("logits_to_keep")
    if labels is not None:
        return labels != -100
    if isinstance(kept_logits, Tensor):
        used[:, kept_logits] = True
    elif kept_logits:
        used[:, -kept_logits:] = True
    ids = facts.token_ids(shape)
    if ids is not None and facts.pooled_pad_id is not None:
        used |= last_tokens(ids != facts.pooled_pad_id, 1, shape, device)
    return used | last_tokens(real, 1, shape, device)


def labels_of(facts: CallFacts, shape: tuple[int, int]) -> Tensor | None:
    """What each position is trained to predict, -100 for nothing, `(batch, length)`; `None` without labels."""
    shifted, labels = facts.arguments.get("shift_labels"), facts.arguments.get("labels")
    if isinstance(shifted, Tensor) and tuple(shifted.shape) == shape:
        return shifted
    # Targets of a multi-label classifier have this shape, too, where a sequence has a token for each label.
    if not isinstance(labels, Tensor) or tuple(labels.shape) != shape or labels.is_floating_point():
        return None
    return pad(labels[:, 1:], (0, 1), value=-100) if facts.shifted_labels else labels


def uses_every_prediction(facts: CallFacts) -> bool:
    """Whether labels leave no token of the call to merge: all real ones but the last of a sequence have one."""
    shape = facts.shape
    labels = None if shape is None else labels_of(facts, shape)
    if shape is None or labels is None:
        return False
    real = real_tokens(single_mask(facts.arguments.get("attention_mask")), shape, facts.past_length)
    is_free = (labels == -100) & ~last_tokens(real, 1, shape, labels.device)
    return not bool((is_free if real is None else is_free & real).any())
