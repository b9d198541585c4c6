"""The plugin itself: merge tokens, run the feed-forward network once per group, expand again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .compression import compress, expand
from .config import VariatorConfig
from .grouping import Grouping
from .plugin import PluginModule
from .rule import MergeRule, rule_of


__all__ = ["FeedForwardEnd", "VariatorLayer"]


class FeedForwardEnd(PluginModule):
    """Wraps the last module of a feed-forward network that has no module of its own.

    Args:
        base_layer: the module whose output is the network's output.
        start_name: full name of the module where the network starts.
        hidden_size: d, width of the hidden states.
    """

    def __init__(self, base_layer: nn.Module, start_name: str, hidden_size: int) -> None:
        super().__init__(base_layer, hidden_size)
        self.start_name = start_name

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the wrapped module on the merged vectors and expand its output, if the start of the network merged."""
        output = self.base_layer(hidden_states, *args, **kwargs)
        if self.call is None or self.start_name not in self.call.pending:
            return output
        start, grouping, inputs, plugin = self.call.pending.pop(self.start_name)
        return start.expand(output, inputs, grouping, plugin)


class VariatorLayer(PluginModule):
    """A compression plugin around a feed-forward network, or around the module where it starts.

    Compression is the weighted mean of a group (Xiao et al. 2023, section 3.2). Decompression gives each token of the
    group the network's output plus `up(tanh(down_output(output) + down_input(input)))`, which is the paper's
    `Linear(2d → r), tanh, Linear(r → d)` on the concatenation of both, with the part of the output computed once per
    group.

    Args:
        base_layer: the wrapped module.
        name: full name of the wrapped module in the base model.
        hidden_size: d, width of the hidden states.
        has_end: whether a `FeedForwardEnd` expands, because the network goes on behind the wrapped module.
    """

    adapter_layer_names: tuple[str, ...] = (
        "variator_scorer",
        "variator_down_input",
        "variator_down_output",
        "variator_up",
    )
    other_param_names: tuple[str, ...] = ("rules", "trained_ratios")

    def __init__(self, base_layer: nn.Module, name: str, hidden_size: int, has_end: bool) -> None:
        super().__init__(base_layer, hidden_size)
        self.name, self.has_end = name, has_end
        self.rules: dict[str, MergeRule] = {}
        self.trained_ratios: dict[str, tuple[int, int]] = {}  # of the whole plugin, and of this layer
        self.variator_scorer = nn.ModuleDict()
        self.variator_down_input = nn.ModuleDict()
        self.variator_down_output = nn.ModuleDict()
        self.variator_up = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: VariatorConfig) -> None:
        """Add a plugin, or build it anew.

        Args:
            adapter_name: name of the plugin.
            config: its configuration.
        """
        self.rules[adapter_name] = rule_of(config, self.name)
        dim, ratio = self.in_features, self.rules[adapter_name].ratio
        self.trained_ratios[adapter_name] = (config.compression_ratio, ratio)
        is_token = config.scoring == "token"
        self.variator_scorer[adapter_name] = (
            nn.Linear(dim, 1, bias=False) if is_token else nn.Linear(ratio * dim, ratio)
        )
        self.variator_down_input[adapter_name] = nn.Linear(dim, config.bottleneck_dim, bias=False)
        self.variator_down_output[adapter_name] = nn.Linear(dim, config.bottleneck_dim)
        self.variator_up[adapter_name] = nn.Linear(config.bottleneck_dim, dim, bias=False)
        if config.init_weights:
            for module in (self.variator_scorer[adapter_name], self.variator_up[adapter_name]):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def ratio_for(self, adapter_name: str, ratio: int) -> int:
        """The compression ratio of this layer when that of the whole plugin is `ratio`.

        It is `ratio`, but where the scores are tied to one k: there the ratio of the configuration stands for what was
        trained, which `ratio_pattern` may have made another one in this layer.

        Raises:
            ValueError: the plugin's scores are tied to another k.
        """
        trained, own = self.trained_ratios[adapter_name]
        if ratio == 1 or not self._is_concat(adapter_name):
            return ratio
        if ratio not in (trained, own):
            raise ValueError(
                f"compression_ratio={ratio}: the plugin {adapter_name!r} has scoring='concat', whose weights map "
                f"{own} concatenated vectors to {own} scores, so it serves {trained}, as it was trained, and "
                "1 (the exact base model) only. Train a plugin with scoring='token' to change the ratio at run time."
            )
        return own

    def set_ratio(self, adapter_name: str, ratio: int) -> None:
        """Change the compression ratio k of a plugin at run time, to what `ratio_for` gave."""
        self.rules[adapter_name] = replace(self.rules[adapter_name], ratio=ratio)

    def _is_concat(self, adapter_name: str) -> bool:
        return self.variator_scorer[adapter_name].bias is not None

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the network's parameters; it has no `weight`, and a quantised one has neither."""
        for parameter in base_layer.parameters():
            return parameter.device, parameter.dtype if parameter.is_floating_point() else None
        return None, None

    @property
    def active_plugin(self) -> str | None:
        """Name of the plugin that is used, or `None` where the base model's network runs.

        Raises:
            ValueError: several plugins of this layer are active; a vector can be merged by one of them only.
        """
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.rules]
        if len(names) > 1:
            raise ValueError(
                f"Only one Variator plugin can be active on {self.name!r}, got {names}. Call set_adapter with one of "
                "them."
            )
        return names[0] if names else None

    @property
    def choice(self) -> tuple[str, MergeRule] | None:
        """The plugin that merges and its rule; `None` where the base model's network runs, as with a ratio of 1."""
        plugin = self.active_plugin
        return None if plugin is None or self.rules[plugin].ratio == 1 else (plugin, self.rules[plugin])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the feed-forward network, or its start, on merged vectors.

        Args:
            hidden_states: shape `(batch, length, dim)` or `(batch * length, dim)`.

        Raises:
            ValueError: the input has another width than the plugin.
        """
        choice = None if self.call is None else self.call.choices.get(self.name)
        if self.call is None or choice is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        if hidden_states.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name} got vectors of {hidden_states.shape[-1]} entries, but its Variator plugin is made for "
                f"the model's hidden size, {self.in_features}. Name the module where the feed-forward network starts "
                "in target_modules."
            )
        self._check_alone(hidden_states, *args, *kwargs.values())
        plugin, rule = choice
        grouping = self.call.grouping(rule, hidden_states)
        if grouping.num_rows == 0 and not self.has_end:
            return torch.zeros_like(hidden_states)
        output = self.base_layer(compress(hidden_states, grouping, self.variator_scorer[plugin]), *args, **kwargs)
        self._check_output(output)
        if not self.has_end:
            return self.expand(output, hidden_states, grouping, plugin)
        self.call.pending[self.name] = (self, grouping, hidden_states, plugin)
        return output

    def _check_output(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{self.name} gives a {type(output).__name__}, but a Variator plugin needs a network that gives its "
                "output alone. Name other modules where the feed-forward network starts and ends."
            )
        if not self.has_end and output.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name} takes vectors of {self.in_features} entries and gives vectors of {output.shape[-1]}, so "
                "it is only the start of a feed-forward network. Name the module where the network ends in end_module."
            )

    def _check_alone(self, hidden_states: Tensor, *others: Any) -> None:
        for other in others:
            if isinstance(other, (tuple, list)):
                self._check_alone(hidden_states, *other)
            elif isinstance(other, Tensor) and other.dim() > 1 and hidden_states.shape[-2] in other.shape:
                raise ValueError(
                    f"{self.name} takes a second tensor of shape {tuple(other.shape)} beside the hidden states, such "
                    "as a residual, a mask or positions, which is not merged with them. Name modules inside of it "
                    "where the feed-forward network starts (target_modules) and ends (end_module)."
                )

    def expand(self, output: Tensor, hidden_states: Tensor, grouping: Grouping, plugin: str) -> Tensor:
        """Give every token what its group came to, by the weights of a plugin; see [`expand`]."""
        down_input, down_output = self.variator_down_input[plugin], self.variator_down_output[plugin]
        return expand(output, hidden_states, grouping, down_input, down_output, self.variator_up[plugin])
