"""Forward hooks that tell the plugins of a stack about the call they take part in.

The mask and the labels are arguments of modules far above a feed-forward network, so they are recorded there: by
`CallRecorder` on every surrounding `PreTrainedModel`, and by `StackHooks` on the stack itself.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .call import MergeRule, StackCall, StackKind
from .layer import PluginModule, VariatorLayer


__all__ = ["CallRecorder", "CheckpointHook", "StackHooks", "hooks_of"]

# What a head knows and its stack does not; the ids too, which a vision-language model turns into embeddings.
OF_HEADS = ("input_ids", "labels", "logits_to_keep", "shift_labels")
OF_STACKS = ("attention_mask", "inputs_embeds", "past_key_values", "pixel_values", "position_ids")

# Calls of the surrounding models that are under way, outermost first; a thread each, as replicas run in threads.
_active = threading.local()


def _frames() -> list[tuple[nn.Module, dict[str, Any]]]:
    if not hasattr(_active, "frames"):
        _active.frames = []
    return _active.frames


def _recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that say something about its tokens, by name."""
    arguments = dict(zip(_parameters_of(type(module).forward), args, strict=False)) | kwargs
    return {name: arguments[name] for name in OF_HEADS + OF_STACKS if arguments.get(name) is not None}


@cache
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward. Looked up once, as decoding a token should cost nothing."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _close(module: nn.Module) -> None:
    """Drop the record of a module's call, and of calls inside it that ended in an error."""
    frames = _frames()
    for depth in reversed(range(len(frames))):
        if frames[depth][0] is module:
            del frames[depth:]
            return


class CallRecorder:
    """Keeps the arguments of a surrounding model's call while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the call."""
        _close(module)  # a call that ended in an error inside of compiled code was not forgotten
        _frames().append((module, _recorded(module, args, kwargs)))

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the call."""
        _close(module)


class StackHooks:
    """Hands the plugins of a stack a `StackCall` for as long as a call of the stack runs.

    Args:
        stack: the module that receives the tokens and their 2-D mask.
        kind: whether it is an encoder, causal, or a vision encoder.
    """

    def __init__(self, stack: nn.Module, kind: StackKind) -> None:
        self.stack, self.kind = stack, kind
        self.warned: set[str] = set()
        self._plugins: list[PluginModule] | None = None
        self.handles: list[RemovableHandle] = [
            stack.register_forward_pre_hook(self.before, with_kwargs=True),
            stack.register_forward_hook(self.after, always_call=True),
        ]

    def refresh(self) -> None:
        """Look for the stack's plugins anew, after modules were replaced."""
        self._plugins = None

    def plugins(self, stack: nn.Module) -> list[PluginModule]:
        """The plugins inside `stack`, which is this stack or a replica of it made for data parallelism."""
        if stack is not self.stack or self._plugins is None:
            found = [module for module in stack.modules() if isinstance(module, PluginModule)]
            if stack is not self.stack:
                return found
            self._plugins = found
        return self._plugins

    @torch.compiler.disable
    def before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out about the call's tokens and hand that to the plugins."""
        plugins = self.plugins(stack)
        if plugins[0].call is not None:
            _forget(plugins)  # left by a call that ended in an error inside of compiled code
        own = _recorded(stack, args, kwargs)
        tokens = own.get("input_ids", own.get("inputs_embeds"))
        if self.kind == "causal" and tokens is not None and tokens.shape[1] == 1:
            return  # decoding one token at a time: there is nothing to merge
        choices = {plugin.name: plugin.choice for plugin in plugins if isinstance(plugin, VariatorLayer)}
        active = {name: choice for name, choice in choices.items() if choice is not None}
        if not active:
            return
        call = self._call(self._inherited(stack) | own, active)
        for plugin in plugins:
            plugin.call = call

    @torch.compiler.disable
    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take the call back: outside of it, a plugin's feed-forward network is the base model's."""
        plugins = self.plugins(stack)
        if plugins[0].call is not None:
            tie(plugins, output)
            _forget(plugins)

    @staticmethod
    def _inherited(stack: nn.Module) -> dict[str, Any]:
        """What the surrounding models were called with and the stack was not asked for."""
        arguments: dict[str, Any] = {}
        for _, recorded in _frames():
            arguments |= recorded
        asked = set(_parameters_of(type(stack).forward)) - set(OF_HEADS)
        return {name: value for name, value in arguments.items() if name not in asked}

    def _call(self, arguments: dict[str, Any], choices: dict[str, tuple[str, MergeRule]]) -> StackCall:
        surrounding = [module for module, _ in _frames()]
        image_ids = _image_ids(surrounding)
        call = StackCall(
            kind=self.kind,
            arguments=arguments,
            choices=choices,
            image_ids=image_ids,
            shifted_labels=any(_has_language_head(module) for module in surrounding),
            patch_size=_patch_size(self.stack),
        )
        if self.kind == "causal":
            past = arguments.get("past_key_values")
            call.past_length = 0 if past is None else int(past.get_seq_length())
            call.image_tokens = _image_tokens(image_ids) if image_ids and "input_ids" not in arguments else None
            self._warn_about_losses(call)
        call.prepare()
        return call

    def _warn_about_losses(self, call: StackCall) -> None:
        if call.uses_every_prediction():
            self._warn_once(
                "Every token has a label, so every prediction is used and a Variator plugin has nothing to merge. "
                "Set the labels of the prompt to -100: only tokens whose prediction is not used are merged."
            )
        elif call.arguments.get("labels") is None and self._trains_a_language_head(call):
            self._warn_once(
                "A causal model with a Variator plugin is trained without `labels`, so the call counts as the prefill "
                "of a prompt: all but its last position are merged, and a loss on them would see later tokens. Pass "
                "the labels to the model."
            )

    def _trains_a_language_head(self, call: StackCall) -> bool:
        asked_for = call.arguments.get("logits_to_keep") is not None
        return call.shifted_labels and not asked_for and self.stack.training and torch.is_grad_enabled()

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


class CheckpointHook:
    """Gives a block's plugins their call back when gradient checkpointing computes the block again.

    The stack's hooks do the same for all plugins at once. Where layers are on several devices, their backwards run in
    several threads, and each block has to look after its own.
    """

    def __init__(self, block: nn.Module) -> None:
        self.handles: list[RemovableHandle] = [block.register_forward_hook(self.after)]

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Tie the call to the output."""
        if block.gradient_checkpointing and block.training:
            tie([module for module in block.modules() if isinstance(module, PluginModule)], output)


@torch.compiler.disable
def tie(plugins: list[PluginModule], output: Any) -> None:
    """Have a call restored when the backward reaches what it gave.

    A layer that is checkpointed runs a second time during the backward, after other calls may have taken place. The
    gradient of a later tensor is computed just before, so a hook on that restores the call that the tensor came from.

    Args:
        plugins: plugins inside the module that was called.
        output: what the module gave.
    """
    call = plugins[0].call if plugins and torch.is_grad_enabled() else None
    if call is not None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(_restore, plugins, call))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _restore(plugins: list[PluginModule], call: StackCall, gradient: Tensor) -> None:
    if plugins[0].call is None:
        # Behind the backward, a plugin is outside of any call again.
        torch.autograd.Variable._execution_engine.queue_callback(partial(_forget, plugins))
    for plugin in plugins:
        plugin.call = call


def _forget(plugins: list[PluginModule]) -> None:
    for plugin in plugins:
        plugin.call = None


def hooks_of(module: nn.Module, hook_type: type) -> Any:
    """The hook object of a type that is registered on a module, or `None`. Copies of a model have copies of it."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, hook_type):
            return owner
    return None


def _has_language_head(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None


def _image_ids(surrounding: list[nn.Module]) -> tuple[int, ...]:
    """Ids that stand for image or video tokens in the text of the surrounding vision-language model."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = (getattr(module.config, name, None) for module in surrounding for name in names if hasattr(module, "config"))
    return tuple(sorted({token_id for token_id in ids if isinstance(token_id, int)}))


def _image_tokens(image_ids: tuple[int, ...]) -> Tensor | None:
    """Which of the embeddings that a vision-language model was called with are placeholders; `(batch, length)`."""
    for module, recorded in _frames():
        embeddings = recorded.get("inputs_embeds")
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
