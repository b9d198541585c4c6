"""Forward hooks that tell the plugins of a stack about the call they take part in."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .call import StackCall
from .checkpointing import tie
from .facts import CallFacts, StackKind
from .layer import VariatorLayer
from .plugin import PluginModule, hand_out
from .predictions import uses_every_prediction
from .recorder import recorded
from .surroundings import check_routers, gather_facts


__all__ = ["StackHooks", "hooks_of"]


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
            hand_out(None, plugins)  # left by a call that ended in an error inside of compiled code
        own = recorded(stack, args, kwargs)
        tokens = own.get("input_ids", own.get("inputs_embeds"))
        if self.kind == "causal" and tokens is not None and tokens.shape[1] == 1:
            return  # decoding one token at a time: there is nothing to merge
        choices = {plugin.name: plugin.choice for plugin in plugins if isinstance(plugin, VariatorLayer)}
        active = {name: choice for name, choice in choices.items() if choice is not None}
        if not active:
            return
        if "write_index" in own:
            self._warn_once(
                "Continuous batching puts prompts and single tokens of several requests into one sequence, where a "
                "Variator plugin merges nothing: the base model runs. Call `generate` to have prompts merged."
            )
            return
        check_routers(stack, own)
        call = StackCall(gather_facts(stack, self.kind, own), active)
        if self.kind == "causal":
            self._warn_about_losses(call.facts)
        call.prepare()
        hand_out(call, plugins)

    @torch.compiler.disable
    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take the call back: outside of it, a plugin's feed-forward network is the base model's."""
        plugins = self.plugins(stack)
        if plugins[0].call is not None:
            tie(plugins, output)
            hand_out(None, plugins)

    def _warn_about_losses(self, facts: CallFacts) -> None:
        if uses_every_prediction(facts):
            self._warn_once(
                "Every token has a label, so every prediction is used and a Variator plugin has nothing to merge. "
                "Set the labels of the prompt to -100: only tokens whose prediction is not used are merged."
            )
        elif facts.arguments.get("labels") is None and self._trains_a_language_head(facts):
            self._warn_once(
                "A causal model with a Variator plugin is trained without `labels`, so the call counts as the prefill "
                "of a prompt: all but its last position are merged, and a loss on them would see later tokens. Pass "
                "the labels to the model."
            )

    def _trains_a_language_head(self, facts: CallFacts) -> bool:
        asked_for = facts.arguments.get("logits_to_keep") is not None
        return facts.shifted_labels and not asked_for and self.stack.training and torch.is_grad_enabled()

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


def hooks_of(module: nn.Module, hook_type: type) -> Any:
    """The hook object of a type that is registered on a module, or `None`. Copies of a model have copies of it."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, hook_type):
            return owner
    return None
