"""What a model tells when plugins are put in: where its feed-forward networks are, and of what kind its stacks."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .architectures import FEED_FORWARDS, FeedForward, candidates, find_feed_forwards, matches, owner_of
from .config import VariatorConfig
from .facts import StackKind


__all__ = ["default_targets", "feed_forward_at", "hidden_size_of", "named_stack", "stack_kind"]


def default_targets(model: nn.Module, config: VariatorConfig) -> str:
    """A regex for the feed-forward networks of a known architecture."""
    stacks: dict[str, FeedForward] = {}
    names = []
    for name, feed_forward in find_feed_forwards(model):
        owner_name, owner = owner_of(model, name)
        if _is_decoder_of_an_encoder(owner):
            continue
        if config.compress_vision_tower or stack_kind(owner, feed_forward) != "vision":
            stacks[owner_name] = feed_forward
            names.append(name)
    if not names:
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"No feed-forward network to compress was found in {type(model).__name__} (model type {model_type!r}). "
            "Please specify `target_modules` (where one starts), `end_module` (where it ends) and `stack_module` (the "
            f"module that takes the attention mask). Modules that may be one: {candidates(model)}. Known model types: "
            f"{sorted(FEED_FORWARDS)}."
        )
    return _regex_for(model, names, stacks)


def _is_decoder_of_an_encoder(owner: nn.Module) -> bool:
    """Whether a stack attends to an encoder: only the encoder's networks merge (Xiao et al. 2023, section 4.1)."""
    return isinstance(owner, PreTrainedModel) and bool(getattr(owner.config, "add_cross_attention", False))


def _regex_for(model: nn.Module, names: list[str], stacks: dict[str, FeedForward]) -> str:
    """The most general regex that matches `names` and no other module, so that the plugin fits other heads too.

    Args:
        model: the base model.
        names: full names of the feed-forward networks.
        stacks: the row of the table for each of the models around them, by full name.
    """
    anywhere = "|".join(sorted({rf"(?:.*\.)?{row.start}" for row in stacks.values()}))
    ends = {re.escape(name.rpartition(".")[2]): row for name, row in stacks.items() if name}
    in_stacks = "|".join(rf"(?:.*\.)?{end}\.(?:.*\.)?{row.start}" for end, row in sorted(ends.items()))
    for regex in (anywhere, in_stacks):
        if {name for name, _ in model.named_modules() if re.fullmatch(regex, name)} == set(names):
            return regex
    return "|".join(map(re.escape, names))


def feed_forward_at(owner: nn.Module, key: str, config: VariatorConfig) -> FeedForward:
    """The table's row for a module, or what the configuration says of an architecture that is not in it."""
    row = FEED_FORWARDS.get(owner.config.model_type) if isinstance(owner, PreTrainedModel) else None
    if config.end_module is None and row is not None and matches(row, key):
        return row if config.causal is None else replace(row, causal=config.causal)
    return FeedForward(re.escape(key), config.end_module, config.causal)


def named_stack(model: nn.Module, stack_module: str, key: str) -> tuple[str, nn.Module]:
    """The innermost module around `key` whose name is, or ends in, `stack_module`."""
    name = key
    while name:
        name = name.rpartition(".")[0]
        if name == stack_module or name.endswith(f".{stack_module}"):
            return name, model.get_submodule(name)
    if stack_module == "":
        return "", model
    raise ValueError(
        f"stack_module={stack_module!r} is no module around {key!r}. Name one of the modules on its path, or '' for "
        "the model itself."
    )


def stack_kind(stack: nn.Module, feed_forward: FeedForward, model: nn.Module | None = None) -> StackKind:
    """Whether a stack is an encoder, causal, or a vision encoder.

    Args:
        stack: the module that receives the tokens.
        feed_forward: the table's row for its networks.
        model: the whole model, which may use the stack otherwise than its architecture tells.
    """
    if isinstance(stack, PreTrainedModel) and stack.main_input_name == "pixel_values":
        return "vision"
    causal = feed_forward.causal
    if causal is None:
        marks = [bool(module.is_causal) for module in stack.modules() if hasattr(module, "is_causal")]
        causal = any(marks) if marks else _has_causal_heads_alone(stack)
        causal = causal or (model is not None and _writes_for_another(stack, model))
    return "causal" if causal else "encoder"


def _has_causal_heads_alone(stack: nn.Module) -> bool:
    """Whether transformers offers the architecture for next-token prediction and not for filling in masked words."""
    model_type = stack.config.model_type if isinstance(stack, PreTrainedModel) else None
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _writes_for_another(stack: nn.Module, model: nn.Module) -> bool:
    """Whether a model of several towers writes its text with a stack, though its attention is not all causal.

    PaliGemma's is such a one: images and prompt attend both ways, what it writes does not.
    """
    return any(
        isinstance(around, PreTrainedModel)
        and around.can_generate()
        and around.config.get_text_config() is not around.config
        and not (around.config.is_encoder_decoder or around.config.get_text_config().is_encoder_decoder)
        and around.get_input_embeddings() in stack.modules()
        for around in model.modules()
    )


def hidden_size_of(owner: nn.Module, target: nn.Module, key: str) -> int:
    """Width of the hidden states that a feed-forward network takes and gives."""
    if isinstance(owner, PreTrainedModel) and hasattr(owner.config, "hidden_size"):
        return int(owner.config.hidden_size)
    for module in target.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(
        f"The width of {key!r} is not known: it has no nn.Linear and its model has no config.hidden_size."
    )
