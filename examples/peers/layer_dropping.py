"""Whole layers of a causal model left out, without training, as ShortGPT chooses them: an own minimal restatement.

Men et al. 2024 (https://arxiv.org/abs/2403.03853): how much a layer does is 1 minus the cosine between what goes in
and what comes out, in the mean over tokens (equation 1); the layers that do least go.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from peft_variator.profiling import share_weights


__all__ = ["influence", "keep_layers"]


@torch.inference_mode()
def influence(model: Any, texts: Tensor) -> list[float]:
    """How much each layer does.

    Args:
        model: a causal model in evaluation mode, of Llama's shape.
        texts: token ids without padding, shape `(texts, length)`.
    """
    layers = model.model.layers
    found = [0.0] * len(layers)

    def add(number: int, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        found[number] += (1 - cosine_similarity(args[0], output, dim=-1).mean().item()) / len(texts)

    hooks = [layer.register_forward_hook(partial(add, number)) for number, layer in enumerate(layers)]
    for text in texts:
        model(input_ids=text[None], logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def keep_layers(model: Any, places: Sequence[int]) -> Any:
    """A model of the same weights that has some of the layers alone.

    Args:
        model: a causal model of Llama's shape, which is not changed.
        places: of the layers that stay, in order.
    """
    smaller = share_weights(model)
    smaller.model.layers = nn.ModuleList(smaller.model.layers[place] for place in places)
    for number, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = number  # its row of the key-value cache
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    if (types := getattr(smaller.config, "layer_types", None)) is not None:
        smaller.config.layer_types = [types[place] for place in places]
    return smaller
