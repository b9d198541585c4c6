"""Where plugins go in a model: by the table of architectures, by the configuration, and by what the model tells."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .architectures import (
    FEED_FORWARDS,
    REFUSED,
    SEQUENCE_FIRST,
    WIDTHS,
    FeedForward,
    candidates,
    check_not_refused,
    find_feed_forwards,
    in_layers,
    owner_of,
    refusal_of,
)
from .config import VariatorConfig
from .forward_context import StackKind, parameter_names
from .layer import FeedForwardEnd
from .network import features_of, is_map


__all__ = [
    "Placement",
    "block_of",
    "default_targets",
    "feed_forward_at",
    "hidden_size_of",
    "layer_of_torch",
    "named_stack",
    "place",
    "regex_for",
    "stack_kind",
]


def default_targets(model: nn.Module, config: VariatorConfig) -> str:
    """A regex for the feed-forward networks of a known architecture."""
    stacks: dict[str, FeedForward] = {}
    widths: dict[str, int] = {}
    names = []
    found = [(name, feed_forward, *owner_of(model, name)) for name, feed_forward in find_feed_forwards(model)]
    found = [each for each in found if not _is_decoder_of_an_encoder(each[-1])]
    towers = {
        owner_name for _, feed_forward, owner_name, owner in found if stack_kind(owner, feed_forward) == "vision"
    }
    # A tower alone: what writes the text would have nothing to merge.
    merges_text = config.compress_text_tokens or config.compress_image_tokens
    only_towers = bool(towers) and config.compress_vision_tower and not merges_text
    for name, feed_forward, owner_name, owner in found:
        if config.compress_vision_tower if owner_name in towers else not only_towers:
            stacks[owner_name] = feed_forward
            names.append(name)
            width = hidden_size_of(owner, model.get_submodule(name), name)
            if widths.setdefault(owner_name, width) != width:
                raise ValueError(f"{type(owner).__name__} takes no plugin: {WIDTHS}.")
    if not names:
        check_not_refused(model)
        model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"No feed-forward network to compress was found in {type(model).__name__} (model type {model_type!r}). "
            "Please specify `target_modules` (where one starts), `end_module` (where it ends) and `stack_module` (the "
            f"module that takes the attention mask). Modules that may be one: {candidates(model)}. Known model types: "
            f"{sorted(FEED_FORWARDS)}."
        )
    if config.compress_vision_tower:
        _warn_about_parts(model, list(stacks))
    return regex_for(model, names, stacks)


def _warn_about_parts(model: nn.Module, stacks: list[str]) -> None:
    """Say which parts of a model of several have layers and get no plugin, since the table has no row for them.

    Args:
        model: the base model.
        stacks: full names of the models that get a plugin.
    """
    left: dict[str, str] = {}
    for key in in_layers(model):
        name, owner = owner_of(model, key)
        if name not in left and isinstance(owner, PreTrainedModel) and owner.config.model_type not in FEED_FORWARDS:
            model_type = owner.config.model_type
            reason = REFUSED.get(model_type, "not known")
            left[name] = f"{(name or type(owner).__name__)!r} (model type {model_type!r}: {reason})"
    if left:
        warnings.warn(
            f"The plugin of {type(model).__name__} goes into {', '.join(map(repr, stacks))} alone. Without one stay "
            f"{', '.join(left.values())}. `target_modules`, `end_module` and `stack_module` describe others.",
            stacklevel=2,
        )


def _is_decoder_of_an_encoder(owner: nn.Module) -> bool:
    """Whether a stack attends to an encoder: only the encoder's networks merge (Xiao et al. 2023, section 4.1)."""
    return isinstance(owner, PreTrainedModel) and bool(getattr(owner.config, "add_cross_attention", False))


def block_of(name: str) -> str | None:
    """Full name of the block that a module is in: up to the first number, which counts the blocks of a stack."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def regex_for(model: nn.Module, names: list[str], stacks: dict[str, FeedForward]) -> str:
    """The most general regex that matches `names` and no other module, so that the plugin fits other heads too.

    Args:
        model: the base model.
        names: full names of modules.
        stacks: the row whose `start` matches them, by the full name of the model that they are in.
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
    if config.end_module is None and row is not None and row.starts_at(key):
        return row if config.causal is None else replace(row, causal=config.causal)
    reads_last_place = row is not None and row.reads_last_place
    return FeedForward(re.escape(key), config.end_module, config.causal, reads_last_place=reads_last_place)


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
    """Whether a stack is an encoder, causal, or an encoder of images or of sound.

    Args:
        stack: the module that receives the tokens.
        feed_forward: the table's row for its networks.
        model: the whole model, which may use the stack otherwise than its architecture tells.
    """
    if isinstance(stack, PreTrainedModel) and "pixel_values" in (stack.main_input_name, *parameter_names(stack)[:1]):
        return "vision"
    if feed_forward.entries_a_frame is not None:
        return "audio"
    causal = feed_forward.causal
    if causal is None:
        marks = [bool(module.is_causal) for module in stack.modules() if hasattr(module, "is_causal")]
        causal = any(marks) if marks else _has_causal_heads_alone(stack)
        # Of XLM and Flaubert, whose modules have no mark, the configuration tells.
        causal = causal or (isinstance(stack, PreTrainedModel) and bool(getattr(stack.config, "causal", False)))
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
        and _embeds_in(around, stack)
        for around in model.modules()
    )


def _embeds_in(model: PreTrainedModel, stack: nn.Module) -> bool:
    """Whether the embeddings of a model's words lie in a stack."""
    try:
        return model.get_input_embeddings() in stack.modules()
    except NotImplementedError:  # where transformers does not find which they are
        return False


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


@dataclass(frozen=True)
class Placement:
    """Where the plugin of one feed-forward network goes in a model.

    Args:
        key: full name of the module where the network starts.
        feed_forward: the table's row for it.
        hidden_size: d, width of the hidden states.
        stack_name: full name of the module that receives the tokens and their mask.
        stack: that module.
        kind: whether the stack is an encoder, causal, or an encoder of images or of sound.
        layers: of a span, which starts at a whole layer, the full names of its layers.
    """

    key: str
    feed_forward: FeedForward
    hidden_size: int
    stack_name: str
    stack: nn.Module
    kind: StackKind
    layers: tuple[str, ...] = ()

    @property
    def ends(self) -> list[str]:
        """Full names of the modules where the network starts and ends; one where one module is all of it."""
        parent, end = self.key.rpartition(".")[0], self.feed_forward.end
        return [self.key] if end is None else [self.key, f"{parent}.{end}".strip(".")]


def layer_of_torch(model: nn.Module, key: str) -> nn.TransformerEncoderLayer | nn.TransformerDecoderLayer | None:
    """The layer of torch's own transformer whose feed-forward network starts at `key`, if it is one."""
    parent = model.get_submodule(key.rpartition(".")[0])
    return parent if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) else None


def _check_widths(model: nn.Module, key: str, target: nn.Module, end: str | None, hidden_size: int) -> None:
    """Raise where a network cannot start or end, as far as the modules alone tell it.

    Args:
        model: the base model.
        key: full name of the module where the network starts.
        target: that module.
        end: where it ends, named relative to the parent of `key`; `None`: `target` is all of it.
        hidden_size: d, width of the hidden states.
    """
    if is_map(target) and features_of(target)[0] != hidden_size:
        raise ValueError(
            f"{key} takes vectors of {features_of(target)[0]} entries, but the model's hidden size is "
            f"{hidden_size}: no feed-forward network starts there. Name the module where one does in target_modules."
        )
    if end is None:
        if is_map(target) and features_of(target)[1] != hidden_size:
            raise ValueError(
                f"{key} takes vectors of {hidden_size} entries and gives vectors of {features_of(target)[1]}, so it "
                "is only the start of a feed-forward network. Name the module where the network ends in end_module."
            )
        return
    path = f"{key.rpartition('.')[0]}.{end}".removeprefix(".")
    module = model.get_submodule(path)
    module = module.base_layer if isinstance(module, FeedForwardEnd) else module
    if any(module is inner for inner in target.modules()):
        raise ValueError(
            f"end_module={end!r} lies inside of {key!r}, where the network starts. Leave end_module out where one "
            "module is the whole network, or name one behind it."
        )
    if is_map(module) and features_of(module)[1] != hidden_size:
        raise ValueError(
            f"end_module={end!r} ({path!r}) gives vectors of {features_of(module)[1]} entries, but the model's hidden "
            f"size is {hidden_size}: no feed-forward network ends there. Name the module that gives its output."
        )
    required = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    if len(required) > 1:
        raise ValueError(
            f"end_module={end!r} ({path!r}) takes {' and '.join(required)}: what comes beside the merged tokens, such "
            "as a residual, is not merged with them. Name a module in it that takes the network's vectors alone."
        )


def place(model: nn.Module, config: VariatorConfig, key: str, target: nn.Module) -> Placement:
    """Where the plugin of one feed-forward network goes; changes nothing.

    Args:
        model: the base model.
        config: the plugin's configuration.
        key: full name of the module where the network starts.
        target: that module, without a plugin.

    Raises:
        ValueError: the architecture takes no plugin, the model has no such end of the network or no such stack, or
            does not tell its hidden size.
    """
    owner_name, owner = owner_of(model, key)
    refusal = refusal_of(owner)
    if refusal is not None:
        raise ValueError(f"{refusal}. Take {key!r} out of target_modules.")
    layer = layer_of_torch(model, key)
    if layer is not None and not layer.self_attn.batch_first:
        raise ValueError(
            f"{key!r} lies in a {type(layer).__name__} with batch_first=False: {SEQUENCE_FIRST}. Make it with "
            "batch_first=True."
        )
    feed_forward = feed_forward_at(owner, key, config)
    hidden_size = hidden_size_of(owner, target, key)
    if feed_forward.end is not None:
        parent = model.get_submodule(key.rpartition(".")[0])
        try:
            parent.get_submodule(feed_forward.end)
        except AttributeError as error:
            raise ValueError(
                f"end_module={feed_forward.end!r} was not found beside {key!r}. Name the module relative to the "
                "parent of the module where the feed-forward network starts; that has "
                f"{sorted(dict(parent.named_children()))}."
            ) from error
    _check_widths(model, key, target, feed_forward.end, hidden_size)
    stack_name, stack = owner_name, owner
    if config.stack_module is not None:
        stack_name, stack = named_stack(model, config.stack_module, key)
    elif feed_forward.stack is not None:
        stack_name, stack = named_stack(model, feed_forward.stack, key)
    return Placement(key, feed_forward, hidden_size, stack_name, stack, stack_kind(stack, feed_forward, model))
