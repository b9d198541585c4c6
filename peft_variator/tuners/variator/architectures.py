"""The one table of where the feed-forward network of each architecture starts and ends, and how it is looked up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


__all__ = ["FEED_FORWARDS", "FeedForward", "candidates", "find_feed_forwards", "owner_of"]


@dataclass(frozen=True)
class FeedForward:
    """Where the feed-forward network of an architecture is.

    Args:
        start: regex over the end of a module's full name: the module that takes the network's input.
        end: name, relative to the parent of `start`, of the module that gives its output, before the residual is
            added. `None`: `start` is the whole network.
        causal: whether the stack is causal. `None` reads it off the attention modules' `is_causal`.
    """

    start: str
    end: str | None = None
    causal: bool | None = None


_POST_NORM = FeedForward(r"layer\.\d+\.intermediate", "output.dense")
_T5_ENCODER = FeedForward(r"block\.\d+\.layer\.1\.DenseReluDense")
_BART_ENCODER = FeedForward(r"encoder\.layers\.\d+\.fc1", "fc2")
_DECODER_MLP = FeedForward(r"layers\.\d+\.mlp")
_GPT2_MLP = FeedForward(r"h\.\d+\.mlp")
_VISION_MLP = FeedForward(r"layers?\.\d+\.mlp")

FEED_FORWARDS: dict[str, FeedForward] = {
    "albert": FeedForward(r"albert_layers\.\d+\.ffn", "ffn_output"),
    "bart": _BART_ENCODER,
    "bert": _POST_NORM,
    "camembert": _POST_NORM,
    "clip_text_model": FeedForward(r"layers\.\d+\.mlp", causal=True),
    "clip_vision_model": _VISION_MLP,
    "deberta": _POST_NORM,
    "deberta-v2": _POST_NORM,
    "deit": _VISION_MLP,
    "dinov2": _VISION_MLP,
    "dinov2_with_registers": _VISION_MLP,
    "distilbert": FeedForward(r"layer\.\d+\.ffn"),
    "electra": _POST_NORM,
    "gemma": _DECODER_MLP,
    "gemma2": _DECODER_MLP,
    "gemma3_text": _DECODER_MLP,
    "gpt2": _GPT2_MLP,
    "gpt_neox": _DECODER_MLP,
    "gptj": _GPT2_MLP,
    "llama": _DECODER_MLP,
    "mbart": _BART_ENCODER,
    "mistral": _DECODER_MLP,
    "mixtral": _DECODER_MLP,
    "modernbert": _DECODER_MLP,
    "mpnet": _POST_NORM,
    "mt5": _T5_ENCODER,
    "olmo2": _DECODER_MLP,
    "opt": FeedForward(r"layers\.\d+\.fc1", "fc2"),
    "phi3": _DECODER_MLP,
    "qwen2": _DECODER_MLP,
    "qwen2_moe": _DECODER_MLP,
    "qwen3": _DECODER_MLP,
    "qwen3_moe": _DECODER_MLP,
    "roberta": _POST_NORM,
    "siglip_text_model": _DECODER_MLP,
    "siglip_vision_model": _VISION_MLP,
    "smollm3": _DECODER_MLP,
    "t5": _T5_ENCODER,
    "umt5": _T5_ENCODER,
    "vit": _VISION_MLP,
    "xlm-roberta": _POST_NORM,
}


def owner_of(model: nn.Module, module_name: str) -> tuple[str, nn.Module]:
    """The innermost `PreTrainedModel` around a module, which is the one that sees the 2-D mask; else the model itself.

    Args:
        model: the base model.
        module_name: full name of a module in it.

    Returns:
        The owner's full name ("" for the model itself) and the owner.
    """
    name = module_name
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return name, module
    return "", model


def matches(feed_forward: FeedForward, module_name: str) -> bool:
    """Whether a module's full name is where `feed_forward` starts."""
    return re.fullmatch(rf"(?:.*\.)?{feed_forward.start}", module_name) is not None


def find_feed_forwards(model: nn.Module) -> Iterator[tuple[str, FeedForward]]:
    """Every feed-forward network of a model that the table knows.

    Args:
        model: the base model; composite models (vision-language, dual encoders) are found through their parts.

    Yields:
        The full name of the module it starts at, and its row of the table.
    """
    owners: dict[str, FeedForward | None] = {}
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name not in owners:
            owners[name] = owners.get(parent) if name else None
        if isinstance(module, PreTrainedModel):
            owners[name] = FEED_FORWARDS.get(module.config.model_type)
        feed_forward = owners.get(parent) if name else None
        if feed_forward is not None and matches(feed_forward, name):
            yield name, feed_forward


def candidates(model: nn.Module, limit: int = 12) -> list[str]:
    """Names of modules that look like a feed-forward network: inside a layer of a `ModuleList`, with a linear map.

    Args:
        model: any model.
        limit: how many names at most.
    """
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        inside_layer = re.search(r"\.\d+\.", f".{name}")
        if inside_layer and any(isinstance(child, nn.Linear) for child in module.children()):
            found.setdefault(re.sub(r"\.\d+\.", ".*.", f".{name}").removeprefix("."))
    return list(found)[:limit]
