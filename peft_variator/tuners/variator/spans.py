"""Spans: some consecutive layers, attention included, run on merged vectors, and every token keeps its own residual.

Xiao et al. 2023 (https://arxiv.org/abs/2310.15724) merge around feed-forward networks alone, so attention costs what
it did. Around a span the merged vectors X go through whole layers and come out as Y, and a token x gets
x + (Y − X) + c(x, Y − X), with the correction c of the plugin: what the layers add to a stream is shared by a group,
as that of a network is elsewhere. Attention among n/k vectors takes 1/k² of the work.

It needs layers that take the hidden states and nothing else. Those of a text come with the mask of its padding, its
positions and an order to keep hidden, so spans are for encoders of images and of sound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from .architectures import FEED_FORWARDS, FeedForward, find_feed_forwards, owner_of
from .config import VariatorConfig
from .placement import Placement, block_of, regex_for, stack_kind


__all__ = ["SPANNED", "place_span", "span_targets"]

SPANNED = (
    "aimv2_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "siglip_vision_model",
    "vit",
    "vit_msn",
    "whisper",
)
"""Architectures (`model_type`) whose layers take the hidden states alone."""


def span_targets(model: nn.Module, config: VariatorConfig) -> str:
    """A regex for the layers where the spans of a plugin start.

    Args:
        model: the base model; of a composite one the parts that can have spans.
        config: the plugin's configuration, with `layer_spans`.

    Raises:
        ValueError: no part of the model can have spans, or one has too few layers for them.
    """
    spans = config.layer_spans or []
    starts: dict[str, FeedForward] = {}
    names: list[str] = []
    for layers, row, owner_name in _stacks_of_layers(model):
        depth = len(model.get_submodule(layers)._modules)
        if spans[-1][1] >= depth:
            raise ValueError(
                f"layer_spans={spans} ends with layer {spans[-1][1]}, and {layers!r} has {depth} layers, 0 to "
                f"{depth - 1}. Name layers that there are."
            )
        numbers = "|".join(str(first) for first, _ in spans)
        stem = row.start.partition(r"\.\d+")[0]
        starts[owner_name] = replace(row, start=rf"{stem}\.(?:{numbers})")
        names += [f"{layers}.{first}" for first, _ in spans]
    if not names:
        raise ValueError(
            f"layer_spans={spans}: no layers that take hidden states alone were found in {type(model).__name__}. "
            f"Spans are for the encoders of images and sound of these model types: {', '.join(SPANNED)}. Leave "
            "layer_spans out, and the plugin merges around feed-forward networks."
        )
    return regex_for(model, names, starts)


def _stacks_of_layers(model: nn.Module) -> Iterator[tuple[str, FeedForward, str]]:
    """Of each encoder that can have spans: the name of its list of layers, its row of the table, and its own name."""
    seen = set()
    for name, row in find_feed_forwards(model):
        owner_name, owner = owner_of(model, name)
        block = block_of(name)
        layers = None if block is None else block.rpartition(".")[0]
        if layers is None or layers in seen or not _can_have_spans(owner):
            continue
        seen.add(layers)
        yield layers, row, owner_name


def _can_have_spans(owner: nn.Module) -> bool:
    return isinstance(owner, PreTrainedModel) and owner.config.model_type in SPANNED


def place_span(model: nn.Module, config: VariatorConfig, key: str) -> Placement:
    """Where the plugin of one span goes; changes nothing.

    Args:
        model: the base model.
        config: the plugin's configuration, with `layer_spans`.
        key: full name of the layer where it starts.

    Raises:
        ValueError: no span starts there, its last layer is missing, or the layers take more than hidden states.
    """
    spans: Sequence[Sequence[int]] = config.layer_spans or []
    layers, _, number = key.rpartition(".")
    last = next((span[1] for span in spans if number == str(span[0])), None)
    if last is None:
        raise ValueError(
            f"target_modules={config.target_modules!r} names {key!r}, where none of layer_spans={list(spans)} starts. "
            "Leave target_modules out: the layers are found by themselves."
        )
    owner_name, owner = owner_of(model, key)
    if not _can_have_spans(owner):
        raise ValueError(
            f"layer_spans={list(spans)}: the layers of {type(owner).__name__} ({key!r}) take more than the hidden "
            f"states, such as a mask or positions. Spans are for these model types: {', '.join(SPANNED)}."
        )
    siblings = model.get_submodule(layers)._modules
    if str(last) not in siblings:
        raise ValueError(f"layer_spans={list(spans)}: {layers!r} has no layer {last}, only {len(siblings)} of them.")
    assert isinstance(owner, PreTrainedModel)  # what can have spans
    row = FEED_FORWARDS[owner.config.model_type]
    span = replace(row, start=re.escape(key), end=None if number == str(last) else str(last))
    width, kind = int(owner.config.hidden_size), stack_kind(owner, span, model)
    inside = tuple(f"{layers}.{each}" for each in range(int(number), last + 1))
    return Placement(key, span, width, owner_name, owner, kind, inside)
