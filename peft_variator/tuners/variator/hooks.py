"""Where a call is noticed: the wrapped `forward` of a stack, and of the models around it.

An instance's `forward` is wrapped, and not hooked, since programs call it without `__call__`, as sentence-transformers
does. Classes stay as they are.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ...compat import FORWARD_SLOTS, annotate_export, checkpoint_function, forward_slot, set_checkpoint_function
from ...models import shifts_labels
from .attention_mask import TokenOrder, real_tokens, single_mask, token_ranks
from .forward_context import (
    IGNORED_LABEL,
    OF_HEADS,
    RATIO_NOTE,
    CallFacts,
    ForwardCall,
    PluginRatios,
    StackKind,
    call_around,
    merges_any_size,
    next_token_labels,
    open_calls,
    parameter_names,
    recompute_inside,
    recomputed_calls,
    recorded_arguments,
    run_inside,
    selection_of,
)
from .layer import PluginModule, VariatorLayer
from .linear_maps import pass_gradients, unwrap_gradients
from .token_groups import MergeRule, StackGroups


__all__ = ["StackForward", "SurroundingForward", "forward_of", "unwrap_forwards"]


class WrappedForward:
    """Stands in for the `forward` of one module and looks like it; deep copies and pickles go with their module.

    Args:
        module: the module.
        ratios: the compression ratios of all plugins of the base model.
    """

    def __init__(self, module: nn.Module, ratios: PluginRatios) -> None:
        self.module, self.ratios = module, ratios
        self.names = parameter_names(module)
        # accelerate wraps forwards, too, and moves the inputs of a call to the module's device first: go inside of it.
        self.slot = forward_slot(module)
        self.wrapped: Callable[..., Any] | None = vars(module).get(self.slot)
        """What was there: `None` where it is the forward of the module's class."""
        setattr(module, self.slot, self)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._bound)

    @property
    def __code__(self) -> CodeType:  # torch.export looks up where a forward stands
        return inspect.unwrap(type(self.module).forward).__code__

    @property
    def _bound(self) -> Callable[..., Any]:
        return type(self.module).forward.__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.begin(recorded_arguments(self.names, args, kwargs))
        return run_inside((*open_calls(), call), self._forward, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.wrapped is not None:
            return self.wrapped(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def begin(self, arguments: dict[str, Any]) -> ForwardCall:
        """The record of a call that is about to run."""
        around = call_around(self.ratios)
        return ForwardCall(self.module, arguments, self.ratios, around.chosen, around.min_tokens)

    def unwrap(self) -> None:
        """Give the module its own `forward` back, wherever others have moved this one since."""
        for slot in FORWARD_SLOTS:
            if vars(self.module).get(slot) is self:
                if self.wrapped is not None:
                    setattr(self.module, slot, self.wrapped)
                elif slot == "forward":
                    delattr(self.module, slot)
                else:
                    setattr(self.module, slot, self._bound)


def forward_of(module: nn.Module) -> WrappedForward | None:
    """The wrapped `forward` of a module, if it has one."""
    for slot in FORWARD_SLOTS:
        found = vars(module).get(slot)
        if isinstance(found, WrappedForward):
            return found
    return None


def unwrap_forwards(model: nn.Module) -> None:
    """Give all modules of a model their own `forward` back."""
    unwrap_gradients(model)
    for module in model.modules():
        forward = forward_of(module)
        if forward is not None:
            forward.unwrap()


class SurroundingForward(WrappedForward):
    """The `forward` of a model around a stack, which knows more than the stack is told."""

    def is_used(self) -> bool:
        """Whether a stack inside has a plugin."""
        return any(isinstance(module, VariatorLayer) and module.rules for module in self.module.modules())


class StackForward(WrappedForward):
    """The `forward` of the module that receives the tokens and their mask: its calls know how plugins merge.

    Args:
        module: the stack.
        ratios: the compression ratios of all plugins of the base model.
        kind: whether it is an encoder, causal, or an encoder of images or of sound.
        entries_a_frame: of an encoder of sound: see [`FeedForward`].
        reads_last_place: see [`FeedForward`].
    """

    def __init__(
        self,
        module: nn.Module,
        ratios: PluginRatios,
        kind: StackKind,
        entries_a_frame: int = 1,
        *,
        reads_last_place: bool = False,
    ) -> None:
        self.kind, self.entries_a_frame, self.reads_last_place = kind, entries_a_frame, reads_last_place
        self.warned: set[str] = set()
        self.surroundings: list[SurroundingForward] = []
        self._layers: list[VariatorLayer] = []
        self._blocks: list[nn.Module] = []
        self._has_named_ends = self._has_spans = False
        self.fixed_choices: dict[str, tuple[str, MergeRule]] | None = None
        """What `choices` has to give in every call, where weights were made for it; `None`: it may be anything."""
        super().__init__(module, ratios)

    def refresh(self, surroundings: list[SurroundingForward]) -> None:
        """Look for the stack's plugins anew, after modules were replaced.

        Args:
            surroundings: the wrapped forwards around the stack, which go with its own.
        """
        self.surroundings = surroundings
        self._layers, self._blocks = [], []
        for module in self.module.modules():
            if isinstance(module, PluginModule):
                module.stack = self
            if isinstance(module, VariatorLayer):
                self._layers.append(module)
            if hasattr(module, "gradient_checkpointing"):  # transformers' stacks and blocks that can be checkpointed
                self._blocks.append(module)
        configs = [config for layer in self._layers for config in layer.configs.values()]
        self._has_spans = any(layer.is_span for layer in self._layers)
        self._has_named_ends = any(config.end_module is not None for config in configs)

    @property
    def _outermost(self) -> nn.Module:
        return self.surroundings[0].module if self.surroundings else self.module

    def release_if_unused(self) -> None:
        """Give the stack and what is around it their own forwards back, when no plugin is left."""
        if not any(layer.rules for layer in self._layers):
            self.unwrap()
            unwrap_gradients(self._outermost)
            for forward in self.surroundings:
                if not forward.is_used():
                    forward.unwrap()

    def current_groups(self) -> StackGroups | None:
        """How plugins merge in the call of this stack that is under way in this thread; `None`: there is none."""
        for call in reversed(open_calls()):
            if call.module is self.module:
                return call.groups
        if torch.compiler.is_compiling():
            return None
        return next((call.groups for call in reversed(recomputed_calls()) if call.module is self.module), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.begin(recorded_arguments(self.names, args, kwargs))
        calls = (*open_calls(), call)
        if not torch.is_grad_enabled():
            return self._run_inside(calls, *args, **kwargs)
        self._keep_calls_for_checkpoints()
        if call.groups.choices and not torch.compiler.is_compiling():
            pass_gradients(self._outermost)
        output = self._run_inside(calls, *args, **kwargs)
        tie(output, calls)  # also where nothing is merged: that, too, is to be found again
        return output

    def _run_inside(self, calls: tuple[ForwardCall, ...], *args: Any, **kwargs: Any) -> Any:
        ratio = self._plugin_ratio(calls[-1].chosen) if torch.compiler.is_exporting() else None
        if ratio is None:
            return run_inside(calls, self._forward, *args, **kwargs)
        with annotate_export(RATIO_NOTE, ratio):
            return run_inside(calls, self._forward, *args, **kwargs)

    def _plugin_ratio(self, chosen: Mapping[str, int]) -> int | None:
        """The compression ratio of the plugin that is active, as [`set_compression_ratio`] takes it."""
        for layer in self._layers:
            plugin = layer.active_plugin
            if plugin is not None:
                return chosen.get(plugin, layer.configs[plugin].compression_ratio)
        return None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_named_ends:
            output = super()._forward(*args, **kwargs)
            groups = self.current_groups() if self._has_spans else None
            return output if groups is None else groups.end(output)
        try:
            output = super()._forward(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # rows met tokens
            self._check_ends(error)
            raise
        self._check_ends(None)
        return output

    def _check_ends(self, error: RuntimeError | None) -> None:
        """Raise if a network was merged and did not come to its end, which a user has named."""
        groups = self.current_groups()
        for pending in groups.pending.values() if groups is not None else ():
            end = pending.start.configs[pending.plugin].end_module
            raise ValueError(
                f"end_module={end!r}: the tokens that were merged at {pending.start.name} did not come to it, so it "
                "is not where that feed-forward network ends. Name the module that gives the network's output, before "
                "the residual is added."
            ) from error

    def begin(self, arguments: dict[str, Any]) -> ForwardCall:
        call = super().begin(arguments)
        call.groups = self._groups(call)
        return call

    def _groups(self, call: ForwardCall) -> StackGroups:
        """Find out about the call's tokens."""
        own = call.arguments
        tokens = own.get("input_ids", own.get("inputs_embeds"))
        is_single = self.kind == "causal" and tokens is not None and tokens.shape[1] == 1
        if is_single and _has_cached(own):
            return StackGroups(CallFacts(self.kind), {})  # decoding one token at a time: there is nothing to merge
        choices = self.choices(call.chosen, self._needed(call))
        if not choices:
            return StackGroups(CallFacts(self.kind), {})
        if "write_index" in own:
            self._warn_once(
                "Continuous batching puts prompts and single tokens of several requests into one sequence, where a "
                "Variator plugin merges nothing: the base model runs. Call `generate` to have prompts merged."
            )
            return StackGroups(CallFacts(self.kind), {})
        if self.kind == "audio":
            # What the models around it are called with is about samples, or text.
            facts = CallFacts(self.kind, of_frames(own, self.entries_a_frame))
        else:
            facts = gather_facts(self.module, self.kind, own, self.names)
            facts.reads_last_place = self.reads_last_place
        groups = StackGroups(facts, choices, has_mask=_has_mask((*open_calls(), call)))
        if not groups.choices:
            return groups
        check_routers(self.module, own)
        groups.prepare()
        if self.kind == "causal" and not is_single and not torch.compiler.is_compiling():
            self._warn_about_losses(groups)
        return groups

    @property
    def merges_for_good(self) -> bool:
        """Whether weights were made for calls that are merged, [`fix_choices`]."""
        return self.fixed_choices is not None

    def fix_choices(self) -> None:
        """Have all calls use the plugins and ratios that are chosen now, or raise."""
        self.fixed_choices = self.choices(self.ratios.chosen)

    def _needed(self, call: ForwardCall) -> Mapping[str, int]:
        """How many tokens a call needs to be merged, by plugin: what pays is asked of calls in evaluation mode."""
        # A program that is traced would go by the size of its example for good.
        for_good = self.merges_for_good or torch.compiler.is_exporting() or torch.jit.is_tracing()
        return {} if self.module.training or for_good or merges_any_size() else call.min_tokens

    def choices(
        self, chosen: Mapping[str, int], min_tokens: Mapping[str, int] = MappingProxyType({})
    ) -> dict[str, tuple[str, MergeRule]]:
        """The plugin and its rule of every layer that merges, by the layer's name.

        Args:
            chosen: the ratio that was set at run time, by plugin.
            min_tokens: how many tokens a call needs to be merged, by plugin; not where a thread or task has chosen the
                ratio itself.

        Raises:
            RuntimeError: the weights were made for other choices.
        """
        selection, found = selection_of(self.ratios), {}
        for layer in self._layers:
            plugin = layer.active_plugin
            ratio = None if plugin is None else chosen.get(plugin)
            if selection is not None and not layer.disable_adapters:
                plugin, ratio = selection if selection.adapter in layer.rules else (None, None)
            if plugin is not None:
                rule = layer.rule_at(plugin, ratio)
                if plugin in min_tokens and selection is None:
                    rule = rule._replace(min_tokens=min_tokens[plugin])
                if layer.observes_all:
                    rule = rule._replace(outliers=None)
                if rule.ratio > 1 or layer.observes_all:
                    found[layer.name] = (plugin, rule)
        if self.fixed_choices is not None and found != self.fixed_choices:
            ratios = sorted({rule.ratio for _, rule in self.fixed_choices.values()}) or [1]
            raise RuntimeError(
                f"fold_updates made this model's weights for the plugin and ratio that were chosen then (k = "
                f"{', '.join(map(str, ratios))}), and it is called with others. Choose them on the model that it was "
                "made from, and call fold_updates again."
            )
        return found

    def _warn_about_losses(self, groups: StackGroups) -> None:
        facts, arguments = groups.facts, groups.facts.arguments
        has_labels = arguments.get("labels") is not None or arguments.get("shift_labels") is not None
        if has_labels:
            if groups.merges_nothing() and _uses_every_prediction(facts):
                self._warn_once(
                    "Every token has a label, so every prediction is used and a Variator plugin has nothing to merge. "
                    "Set the labels of the prompt to -100: only tokens whose prediction is not used are merged."
                )
        elif facts.shifted_labels and self.module.training and torch.is_grad_enabled():
            if arguments.get("logits_to_keep") is None:
                self._warn_once(
                    "A causal model with a Variator plugin is trained without `labels`, so the call counts as the "
                    "prefill of a prompt: all but its last position are merged, and a loss on them would see later "
                    "tokens. Pass the labels to the model."
                )

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def _keep_calls_for_checkpoints(self) -> None:
        """Have blocks that are computed again in the backward find the call that they belong to."""
        for block in self._blocks:
            function = checkpoint_function(block) if block.gradient_checkpointing else None
            if function is not None and not isinstance(function, CheckpointInsideCalls):
                set_checkpoint_function(block, CheckpointInsideCalls(function))


def _has_mask(calls: tuple[ForwardCall, ...]) -> bool:
    """Whether an encoder of images or sound, or the model that it is the body of, was called with a mask."""
    for call in calls:
        mask = call.arguments.get("attention_mask")
        # That of a model which takes text as well is the text's; one of four dimensions is made by transformers.
        takes_none = getattr(call.module, "main_input_name", "input_ids") == "input_ids"
        if isinstance(mask, Tensor) and mask.dim() == 2 and not takes_none:
            return True
    return False


# Gradient checkpointing


class CheckpointInsideCalls:
    """A checkpointing function of transformers that keeps the calls under way for when it computes again."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # It may run again in another thread, after other calls of the same model.
        return self.checkpoint(partial(run_inside, open_calls(), function), *args, **kwargs)


def tie(output: Any, calls: tuple[ForwardCall, ...]) -> None:
    """Have the calls found again when the backward reaches what they gave, for models that checkpoint by themselves.

    The gradient of a later tensor is computed just before, in the same thread.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(partial(recompute_inside, calls))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


# What the models around a stack tell about the tokens of its call


def gather_facts(stack: nn.Module, kind: StackKind, own: dict[str, Any], names: tuple[str, ...]) -> CallFacts:
    """What is known about the tokens of a call that is about to run; `names`: all arguments that the stack takes."""
    around = _calls_around(stack)
    known: dict[str, Any] = {}
    for call in around:
        known |= call.arguments
    # What the stack was not given though it takes it, it was not meant to have.
    asked = set(names) - set(OF_HEADS)
    arguments = {name: value for name, value in known.items() if name not in asked} | own
    surrounding = [call.module for call in around]
    if kind == "causal" and "labels" in arguments and any(map(_is_encoder_decoder, surrounding)):
        # Position t of a decoder predicts label t: what it reads was shifted, not what it is held against.
        arguments["shift_labels"] = arguments.pop("labels")
    image_ids = _image_ids(surrounding)
    past = arguments.get("past_key_values") if kind == "causal" else None
    by_embedding = kind == "causal" and image_ids and "input_ids" not in arguments
    return CallFacts(
        kind=kind,
        arguments=arguments,
        image_ids=image_ids,
        image_tokens=_image_tokens(around, image_ids) if by_embedding else None,
        shifted_labels=any(_has_language_head(module) for module in surrounding),
        patch_size=_patch_size(stack),
        pooled_pad_id=_pooled_pad_id(surrounding) if kind == "causal" else None,
        past_length=0 if past is None else past.get_seq_length(),
    )


def _has_cached(own: dict[str, Any]) -> bool:
    """Whether tokens came before those of a call: a text of one token is no step of decoding."""
    past = own.get("past_key_values")
    length = 0 if past is None else past.get_seq_length()
    return isinstance(length, Tensor) or length > 0  # a static cache's length is not looked at on the host


def of_frames(own: dict[str, Any], entries_a_frame: int) -> dict[str, Any]:
    """The arguments of an encoder of sound's call, with a mask that has an entry for each frame, or none (0)."""
    mask = own.get("attention_mask")
    if mask is None or entries_a_frame == 0:
        return {name: value for name, value in own.items() if name != "attention_mask"}
    return own if mask.dim() != 2 else own | {"attention_mask": mask[:, ::entries_a_frame]}


def _calls_around(stack: nn.Module) -> list[ForwardCall]:
    """Calls of the models that a stack is part of, behind the last call of the stack itself."""
    around: list[ForwardCall] = []
    for call in open_calls():
        if call.module is stack:
            around.clear()
        elif call.groups is None:
            around.append(call)
    return around


def check_routers(stack: nn.Module, own: dict[str, Any]) -> None:
    """Raise if a call asks for the loss that balances the load of experts, with a mask: routers see merged rows."""
    asked = own.get("output_router_logits", getattr(getattr(stack, "config", None), "output_router_logits", False))
    if asked and own.get("attention_mask") is not None:
        raise ValueError(
            "output_router_logits=True with an attention_mask: with a Variator plugin the routers see merged rows, "
            "which the mask of the tokens does not fit, so the loss that balances the load cannot be computed. Set "
            "output_router_logits to False, in the call and in the model's config, or the ratio to 1."
        )


def _uses_every_prediction(facts: CallFacts) -> bool:
    """Whether labels leave no token of the call to merge: all real ones but the last of a text have one."""
    shape = facts.shape
    labels = None if shape is None else next_token_labels(facts.arguments, shape, shifted=facts.shifted_labels)
    if shape is None or labels is None:
        return False
    mask = single_mask(facts.arguments.get("attention_mask"))
    real = real_tokens(mask, shape, facts.past_length)
    order = TokenOrder(real, None, token_ranks(mask, real, shape, facts.past_length, labels.device))
    is_free = (labels == IGNORED_LABEL) & ~order.last(1)
    return not bool((is_free if real is None else is_free & real).any())


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _has_language_head(module: nn.Module) -> bool:
    has_head = isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None
    return has_head and shifts_labels(module)


def _pooled_pad_id(surrounding: list[nn.Module]) -> int | None:
    """The id that the surrounding sequence classifier, if there is one, takes for padding."""
    for module in surrounding:
        if isinstance(module, PreTrainedModel) and type(module).__name__ in _SEQUENCE_CLASSIFIERS:
            pad_id = module.config.get_text_config().pad_token_id
            if pad_id is not None:
                return int(pad_id)
    return None


_SEQUENCE_CLASSIFIERS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())


def _image_ids(surrounding: list[nn.Module]) -> tuple[int, ...]:
    """Ids that stand for image or video tokens in the text of the surrounding vision-language model."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    configs = [module.config for module in surrounding if hasattr(module, "config")]
    configs += [config.vision_config for config in configs if hasattr(config, "vision_config")]  # Phi-4 has it there
    ids = [getattr(config, name, None) for config in configs for name in names]
    return tuple(sorted({token_id for token_id in ids if isinstance(token_id, int)}))


def _image_tokens(around: list[ForwardCall], image_ids: tuple[int, ...]) -> Tensor | None:
    """Which of the embeddings that a vision-language model was called with are placeholders; `(batch, length)`."""
    for call in around:
        embeddings = call.arguments.get("inputs_embeds")
        if embeddings is not None and isinstance(call.module, PreTrainedModel):
            with torch.no_grad():
                placeholders = call.module.get_input_embeddings()(torch.tensor(image_ids, device=embeddings.device))
                return (embeddings.unsqueeze(2) == placeholders.to(embeddings)).all(-1).any(-1)
    return None


def _patch_size(stack: nn.Module) -> tuple[int, int] | None:
    """Edge of a patch in pixels, `(height, width)`; `None` for stacks without patches."""
    size = getattr(getattr(stack, "config", None), "patch_size", None)
    if size is None:  # models of timm have no such configuration
        size = getattr(getattr(getattr(stack, "timm_model", None), "patch_embed", None), "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
