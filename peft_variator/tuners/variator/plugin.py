"""What both ends of a plugin have in common: a wrapped module, and the call of the stack that is under way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .call import StackCall


__all__ = ["PluginModule", "hand_out"]


class PluginModule(nn.Module, BaseTunerLayer):
    """What both ends of a plugin have in common: a wrapped module, and the call of the stack that is under way."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    cast_input_dtype_enabled: bool = True
    # Set by the stack's hooks while a call runs. Without one, the feed-forward network is the base model's.
    call: StackCall | None = None

    def __init__(self, base_layer: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        # What PEFT asks of its layers; here the width of a token's vector on either side of the plugin.
        self.in_features = self.out_features = hidden_size
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise: a plugin changes how many vectors the network sees, which no weight of the base model can express."""
        raise NotImplementedError(
            "A Variator plugin cannot be merged: it changes how many vectors go through the feed-forward network, and "
            "no weight of the base model can express that. Keep the plugin beside the base model, or call unload()."
        )

    def unmerge(self) -> NoReturn:
        """Raise: nothing is ever merged."""
        self.merge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The wrapped module, with adapters of other methods that it may carry left on it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.base_layer


def hand_out(call: StackCall | None, plugins: Iterable[PluginModule]) -> None:
    """Tell plugins which call runs; `None`: none does."""
    for plugin in plugins:
        plugin.call = call
