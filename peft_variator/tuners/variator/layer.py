"""The plugin itself: merge tokens, run the feed-forward network once per group, expand again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ...adapter_state import ExactlyLoadedLayer
from .base_reading import Place, Reading, are_there, note_read, places_of, read_base, read_when_loaded
from .config import VariatorConfig
from .decompression import DECOMPRESSIONS, BottleneckDecompression, Decompression, NeuronsDecompression
from .forward_context import PluginRatios, StackKind, runs_single_blocks
from .linear_maps import FloatLinear
from .merging import Groups, SharedGroups
from .network import Network, find_network
from .neurons import NeuronIndex
from .outliers import OutlierProbe
from .scoring import SCORINGS, Scoring
from .token_groups import MergeRule, StackGroups, rule_of


__all__ = [
    "FeedForwardEnd",
    "PluginModule",
    "PluginStack",
    "SpanLayer",
    "VariatorLayer",
    "plugin_layers",
]


class PluginStack(Protocol):
    """The stack that a plugin is part of, which knows the call that is under way."""

    kind: StackKind

    def current_groups(self) -> StackGroups | None:
        """How plugins merge in the call that is under way in this thread; `None`: there is none."""

    @property
    def merges_for_good(self) -> bool:
        """Whether weights were made for calls that are merged (`fold_updates`)."""

    def release_if_unused(self) -> None:
        """Undo what was put around the stack, when no plugin is left."""


class PluginModule(nn.Module, ExactlyLoadedLayer):
    """What both ends of a plugin have in common: a wrapped module, and the stack that it is part of.

    Args:
        base_layer: the wrapped module.
        hidden_size: d, width of the hidden states.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    cast_input_dtype_enabled: bool = True
    # Set when the stack's forward is wrapped.
    stack: PluginStack | None = None

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

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the parameters; a network has no `weight`, and a quantised one has neither."""
        parameter = next(base_layer.parameters(), None)
        return None if parameter is None else parameter.device, self.base_dtype if self.is_new else None

    @property
    def base_dtype(self) -> torch.dtype | None:
        """The dtype of the wrapped module's parameters; `None`: they are no floating-point numbers."""
        parameter = next(self.get_base_layer().parameters(), None)
        return parameter.dtype if parameter is not None and parameter.is_floating_point() else None

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Raise: a replica's layers would ask the original's stack for the call they belong to."""
        raise RuntimeError(
            "A model with a Variator plugin cannot be replicated by nn.DataParallel. Use DistributedDataParallel, for "
            "example by starting the program with `accelerate launch`."
        )


class _BehindStart(PluginModule):
    """A module behind the one where a network or a span starts.

    Args:
        base_layer: the wrapped module.
        start_name: full name of the module where the network or span starts.
        hidden_size: d, width of the hidden states.
    """

    def __init__(self, base_layer: nn.Module, start_name: str, hidden_size: int) -> None:
        super().__init__(base_layer, hidden_size)
        self.start_name = start_name


class FeedForwardEnd(_BehindStart):
    """Wraps the last module of a feed-forward network that has no module of its own, or the last layer of a span."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the wrapped module on the merged vectors and expand its output, if the start of the network merged."""
        call = None if self.stack is None else self.stack.current_groups()
        if call is None or self.start_name not in call.pending:
            return self.base_layer(hidden_states, *args, **kwargs)
        pending: _Pending = call.pending.pop(self.start_name)
        if pending.silences:
            hidden_states = pending.start.silence(hidden_states, pending.groups, pending.plugin)
        if pending.start.is_span:
            args, kwargs = _without_full_mask(call, args, kwargs)
        output = self.base_layer(hidden_states, *args, **kwargs)
        if pending.start.is_span:
            return pending.end_span(call, output)
        if output.shape[-1] != pending.start.in_features:
            raise ValueError(
                f"The feed-forward network that starts at {self.start_name} ends in a module "
                f"({type(self.base_layer).__name__}) that gives vectors of {output.shape[-1]} entries instead of "
                f"{pending.start.in_features}. Name the module that gives the network's output in end_module."
            )
        return pending.start.expand(pending.join(output), pending.rows, pending.inputs, pending.groups, pending.plugin)


class SpanLayer(_BehindStart):
    """Wraps a layer inside of a span, whose output has a vector for a group, to say whose vectors these are."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer."""
        call = None if self.stack is None else self.stack.current_groups()
        pending: _Pending | None = None if call is None else call.pending.get(self.start_name)
        if call is None or pending is None:
            output: Tensor = self.base_layer(hidden_states, *args, **kwargs)
            return output
        args, kwargs = _without_full_mask(call, args, kwargs)
        output = self.base_layer(hidden_states, *args, **kwargs)
        call.note_rows(output, partial(pending.of_tokens, output))
        return output


class _Pending(NamedTuple):
    """What the start of a network, or of a span of layers, leaves for its end.

    Args:
        start: the layer where it starts.
        groups: the groups.
        rows: the merged vectors.
        inputs: the hidden states before merging.
        plugin: name of the plugin.
        of_groups: output of the rows of groups, where the network runs on the others alone.
        silences: whether the network runs on all rows, and the copied neurons are silenced at rows of groups.
    """

    start: VariatorLayer
    groups: Groups
    rows: Tensor
    inputs: Tensor
    plugin: str
    of_groups: Tensor | None = None
    silences: bool = False

    def join(self, output: Tensor) -> Tensor:
        """The output of all rows, from that of the rows that the network ran on."""
        if self.of_groups is None:
            return output
        sequences, groups, dim = self.of_groups.shape
        return self.groups.join(self.of_groups, output.view(sequences, self.rows.shape[1] - groups, dim))

    def of_tokens(self, output: Tensor) -> Tensor:
        """Hidden states of tokens inside of a span: its own residual, and what the layers have added to its group."""
        added = self.groups.spread((output - self.rows).flatten(0, -2))
        return self.inputs + added.view(self.inputs.shape)

    def end_span(self, call: StackGroups, output: Tensor) -> Tensor:
        """What the last layer of a span gives each token, from what it gave each group."""
        expanded = self.start.expand(output, self.rows, self.inputs, self.groups, self.plugin)
        call.note_rows(output, lambda: expanded)
        return expanded


class VariatorLayer(PluginModule):
    """A compression plugin around a feed-forward network, or around the module where it starts.

    Compression is the weighted mean of a group (Xiao et al. 2023, section 3.2), see [`Scoring`]; what each token of
    the group gets of the network's output is up to the [`Decompression`].

    Args:
        base_layer: the wrapped module.
        name: full name of the wrapped module in the base model.
        hidden_size: d, width of the hidden states.
        has_end: whether a `FeedForwardEnd` expands, because the network goes on behind the wrapped module.
        ratios: the compression ratios of all plugins of the base model.
        reads_text: whether its tokens are those of a text, and no patches or frames of sound.
        is_span: whether it wraps a whole layer, the first of a span, and tokens keep their residual.
    """

    adapter_layer_names: tuple[str, ...] = (
        "variator_scorer",
        "variator_outliers",
        *dict.fromkeys(part for decompression in DECOMPRESSIONS.values() for part in decompression.parts),
    )
    other_param_names: tuple[str, ...] = ("rules", "configs", "decompressions")

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        hidden_size: int,
        has_end: bool,
        ratios: PluginRatios,
        reads_text: bool = True,
        is_span: bool = False,
    ) -> None:
        super().__init__(base_layer, hidden_size)
        self.name, self.has_end, self.ratios, self.reads_text = name, has_end, ratios, reads_text
        self.is_span = is_span
        self.rules: dict[str, MergeRule] = {}
        self.configs: dict[str, VariatorConfig] = {}
        self.decompressions: dict[str, str] = {}
        self.around: tuple[nn.Module, FeedForwardEnd | None] | None = None
        """The module that holds this one, and the end of the network; in a tuple, as they are no parts of this one."""
        self.observer: Callable[[VariatorLayer, Tensor, Groups, str], None] | None = None
        """Sees hidden states and groups in place of the plugin, which then runs the base model's network."""
        self._plain: tuple[Network, list[Place]] | None = None
        self.readings: dict[str, Reading] = {}
        """What plugins have read of the base model's weights, if they take anything of them."""
        self.observes_all = False
        """Whether the observer sees calls where nothing is merged here, too; outliers are then merged like others."""
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ModuleDict())
        read_when_loaded(self)

    def update_layer(self, adapter_name: str, config: VariatorConfig) -> None:
        """Add a plugin, or build it anew."""
        rule = rule_of(config, self.name)
        self.rules[adapter_name] = rule if self.reads_text else rule._replace(outliers=None)
        self.configs[adapter_name] = config
        self.ratios.choose(adapter_name, None)
        self.ratios.require(adapter_name, 0)
        network = self.network()
        decompression = config.decompression
        assert decompression is not None  # the configuration has chosen one
        if not DECOMPRESSIONS[decompression].serves(network, config):
            decompression = BottleneckDecompression.name
        self.decompressions[adapter_name] = decompression
        scorer = SCORINGS[config.scoring].create(self.in_features, self.rules[adapter_name].ratio)
        if config.init_weights:
            for parameter in scorer.parameters():
                nn.init.zeros_(parameter)
        parts = self.decompression(adapter_name).create(self.in_features, config, network, self.name)
        if self.rules[adapter_name].outliers is not None:
            probe = OutlierProbe(self.in_features)
            if not config.init_weights:
                probe.fit(torch.randn(self.in_features))
            parts["variator_outliers"] = probe
        for part, module in {"variator_scorer": scorer, **parts}.items():
            getattr(self, part)[adapter_name] = module
        with self.as_new():
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.readings.pop(adapter_name, None)
        if config.reads_base and network is not None and network.is_readable and not config.was_saved:
            note_read(self, adapter_name, network)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def __getstate__(self) -> dict[str, Any]:
        # What was read is known by weak references, which no pickle takes; it is looked at anew where it is missing.
        return {**vars(self), "readings": {}}

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a plugin; see `BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.readings.pop(adapter_name, None)
        if self.stack is not None:
            self.stack.release_if_unused()

    def scoring(self, adapter_name: str) -> Scoring:
        """How a plugin weights the members of a group."""
        return SCORINGS[self.configs[adapter_name].scoring]

    def decompression(self, adapter_name: str) -> Decompression:
        """How a plugin gives a row's output back to its tokens."""
        return DECOMPRESSIONS[self.decompressions[adapter_name]]

    def network(self) -> Network | None:
        """The inside of the wrapped network; `None`: it is not known, or these are whole layers."""
        if self.around is None or self.is_span:
            return None
        parent, end = self.around
        return find_network(self.base_layer, parent, None if end is None else end.base_layer)

    @property
    def end(self) -> nn.Module:
        """The module that gives the output of the network: this one, or a `FeedForwardEnd`."""
        end = None if self.around is None else self.around[1]
        return self if end is None else end

    def modules_of(self, adapter_name: str) -> dict[str, nn.Module]:
        """The weights of a plugin's decompression, by part; a part that this network has no use for is left out."""
        parts = self.decompression(adapter_name).parts
        return {part: getattr(self, part)[adapter_name] for part in parts if adapter_name in getattr(self, part)}

    def rule_at(self, adapter_name: str, ratio: int | None) -> MergeRule:
        """What this layer merges when the whole plugin's compression ratio is `ratio`; `None`: as configured.

        The layer's ratio is `ratio`, or what the plugin's schedule makes of it. Where the weights are tied to one k,
        the ratio of the configuration stands for what was trained, which may be another one in this layer.

        Raises:
            ValueError: the plugin's weights are tied to another k, or its schedule has no such row.
        """
        rule, config = self.rules[adapter_name], self.configs[adapter_name]
        if ratio is None:
            return rule
        has_rows = config.ratio_schedule is not None
        own = config.ratio_of(self.name, ratio) if has_rows else ratio
        if own == 1 or self.scoring(adapter_name).serves_any_ratio:
            return rule._replace(ratio=own)
        trained = config.compression_ratio
        if own != rule.ratio and (has_rows or ratio != trained):
            raise ValueError(
                f"compression_ratio={ratio}: the plugin {adapter_name!r} has scoring={config.scoring!r}, whose "
                f"weights map {rule.ratio} concatenated vectors to {rule.ratio} scores, so it serves {trained}, as it "
                "was trained, and 1 (the exact base model) only. Train a plugin with scoring='token' to change the "
                "ratio at run time."
            )
        return rule

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
    def merges_by_itself(self) -> bool:
        """Whether the plugin that is active would merge, by what was set and configured for it."""
        plugin = self.active_plugin
        return plugin is not None and self.rule_at(plugin, self.ratios.chosen.get(plugin)).ratio > 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the feed-forward network, or its start, on merged vectors.

        Args:
            hidden_states: shape `(batch, length, dim)` or `(batch * length, dim)`.

        Raises:
            RuntimeError: the layer is called outside of any call of its model, which alone tells its tokens apart.
            ValueError: the input has another width than the plugin.
        """
        call = None if self.stack is None else self.stack.current_groups()
        if call is None:
            self._check_reached_without_call()
            return self.base_layer(hidden_states, *args, **kwargs)
        choice = call.choice_of(self.name, hidden_states)
        if choice is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        if hidden_states.is_nested:
            raise ValueError(
                f"{self.name} got a nested tensor, whose tokens a plugin cannot group. torch's TransformerEncoder "
                "makes one of padded texts; make it with enable_nested_tensor=False."
            )
        if hidden_states.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name} got vectors of {hidden_states.shape[-1]} entries, but its Variator plugin is made for "
                f"the model's hidden size, {self.in_features}. Name the module where the feed-forward network starts "
                "in target_modules."
            )
        if self.is_span:
            args, kwargs = _without_full_mask(call, args, kwargs)
        self._check_alone(hidden_states, *args, *kwargs.values())
        return self._forward_merged(call, choice, hidden_states, args, kwargs)

    def _forward_merged(
        self,
        call: StackGroups,
        choice: tuple[str, MergeRule],
        hidden_states: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        plugin, rule = choice
        groups = call.of(rule, hidden_states, plugin, self.score_outliers)
        if groups.num_rows == 0 and not self.has_end:
            return torch.zeros_like(hidden_states)
        if self.observer is not None:
            self.observer(self, hidden_states, groups, plugin)
            return self.base_layer(hidden_states, *args, **kwargs)
        read_base(self, plugin)
        merged = self.compress(hidden_states, groups, plugin)
        pending, run_on = _Pending(self, groups, merged, hidden_states, plugin), merged
        if self.is_span:
            call.note_rows(merged, lambda: hidden_states)
        if self._is_sliced(plugin) and groups.merges:
            if groups.can_split:
                of_groups, run_on = groups.split(merged)
                pending = pending._replace(of_groups=self._run_without_copied(of_groups, plugin))
            else:  # the network runs on rows of all kinds, whose shapes may not depend on how many are groups
                pending = pending._replace(silences=True)
        if pending.silences and not self.has_end:
            network = self._plain_network(plugin)
            output = network.out(self.silence(network.neurons(run_on), groups, plugin))
        else:
            output = self.base_layer(run_on, *args, **kwargs)
        if self.has_end:
            self._check_output(output)
            call.pending[self.name] = pending
            if self.is_span:
                call.note_rows(output, partial(pending.of_tokens, output))
            return output
        if self.is_span:
            self._check_output(output)
            return pending.end_span(call, output)
        # Some mixtures of experts give what their routers said of the rows behind their output.
        rows, *others = output if isinstance(output, tuple) else (output,)
        self._check_output(rows)
        expanded = self.expand(pending.join(rows), merged, hidden_states, groups, plugin)
        return (expanded, *others) if isinstance(output, tuple) else expanded

    def _is_sliced(self, plugin: str) -> bool:
        sliced = self.configs[plugin].correction_form == "sliced"
        return sliced and self.decompressions[plugin] == NeuronsDecompression.name

    def _run_without_copied(self, rows: Tensor, plugin: str) -> Tensor:
        """F₋S(m), what the network gives for rows without the neurons that are copied; the shape of `rows`."""
        network = self._plain_network(plugin)
        return network.with_neurons_alone(rows, self.neurons_of(plugin).rest(network.width))

    def silence(self, activated: Tensor, groups: Groups, plugin: str) -> Tensor:
        """The outputs of all neurons for rows, with 0 for the copied ones where tokens share the row.

        Args:
            activated: shape `(…, width)`, with as many vectors as there are rows.
            groups: the groups.
            plugin: name of the plugin.
        """
        copied = self.neurons_of(plugin).flags(activated.shape[-1])
        rows = activated.flatten(0, -2)
        return rows.masked_fill(groups.rows_that_merge() & copied, 0).view(activated.shape)

    def neurons_of(self, plugin: str) -> NeuronIndex:
        """The neurons that a plugin has copies of."""
        neurons = self.modules_of(plugin)["variator_neurons"]
        assert isinstance(neurons, NeuronIndex)  # what the decompression creates
        return neurons

    def find_plain_network(self, plugin: str) -> None:
        """Look for the maps that a plugin with `correction_form="sliced"` takes parts of, if it is one.

        Raises:
            ValueError: their weights can't be sliced.
        """
        if plugin not in self.decompressions or not self._is_sliced(plugin):
            return
        network = self.network()
        wrong = None if network is None else network.unsliceable_map()
        if network is None or wrong is not None:
            found = [name for root in self.roots for name, module in root.named_modules() if module is wrong]
            kind = "" if wrong is None else f" ({found[0]}, a {type(wrong).__name__})"
            raise ValueError(
                f"correction_form='sliced' runs a network without some of its neurons, and the weights of "
                f"{self.name}{kind} cannot be sliced: they are quantised, packed, on disk, or under another adapter. "
                "Use a plugin with correction_form='added', which only calls the network, or load plain weights."
            )
        self._plain = network, places_of(self, network)

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that the network is inside of."""
        end = None if self.around is None else self.around[1]
        return [self] if end is None else [self, end]

    def _plain_network(self, plugin: str) -> Network:
        """The network whose maps are sliced, looked for anew where any of them was replaced."""
        known = self._plain
        is_compiling = torch.compiler.is_compiling()  # what is compiled is what was there
        if known is None or not (is_compiling or are_there(known[1])):
            self.find_plain_network(plugin)
        assert self._plain is not None  # it has been found
        return self._plain[0]

    def probe_of(self, plugin: str) -> OutlierProbe | None:
        """What tells the outliers of a plugin with `keep_outliers`; `None`: it has none here."""
        probes = getattr(self, "variator_outliers")  # noqa: B009  # mypy takes an attribute for a tensor
        return probes[plugin] if plugin in probes else None

    def score_outliers(self, plugin: str, hidden_states: Tensor) -> Tensor:
        """What tells outliers: the logarithm of the norm that the network's output will have, up to a constant.

        Args:
            plugin: name of the plugin.
            hidden_states: shape `(…, dim)`.

        Raises:
            RuntimeError: nothing was fitted to tell it by.
        """
        probe = self.probe_of(plugin)
        if probe is None or not probe.is_fitted:
            raise RuntimeError(
                f"keep_outliers={self.configs[plugin].keep_outliers}: the probe that tells outliers has not been "
                f"fitted to the base model ({self.name}). Call peft_variator.calibrate(model, batches) once before "
                "the plugin is used; DistillationTrainer does so by itself, and the probe is saved with the plugin."
            )
        return probe(hidden_states)

    def compress(self, hidden_states: Tensor, groups: Groups, plugin: str) -> Tensor:
        """Merge each group into one vector.

        Args:
            hidden_states: shape `(batch, length, dim)` or `(batch * length, dim)`.
            groups: the groups.
            plugin: name of the plugin.

        Returns:
            Shape `(sequences, rows, dim)`.
        """
        shape = self.stack_shape(hidden_states, groups)
        tokens = hidden_states.reshape(*shape, hidden_states.shape[-1])
        scorer = getattr(self, "variator_scorer")[plugin]  # noqa: B009  # mypy takes an attribute for a tensor
        assert isinstance(scorer, FloatLinear)  # what a `Scoring` creates
        rows = self.scoring(plugin).merge(scorer, tokens, groups)
        if groups.merges:
            return rows
        # Data parallelism waits for a gradient of every parameter, also from a batch with nothing to merge.
        return rows + 0 * torch.stack([parameter.sum() for parameter in scorer.parameters()]).sum().to(rows.dtype)

    @staticmethod
    def stack_shape(hidden_states: Tensor, groups: Groups) -> tuple[int, int]:
        """`(sequences, length)` of hidden states that may hold all sequences one after the other."""
        if isinstance(groups, SharedGroups):
            length = sum(block.length for block in groups.blocks)
            return groups.row_of.shape[0] // max(length, 1), length
        return 1, groups.row_of.shape[0]

    def expand(self, output: Tensor, rows: Tensor, hidden_states: Tensor, groups: Groups, plugin: str) -> Tensor:
        """Give every token what its group came to, by the weights of a plugin; see [`Decompression`].

        Of a span that is what its layers have added to the group, and the token's own residual stays.
        """
        if self.is_span:
            added = output - rows
            return hidden_states + self.decompression(plugin).expand(
                added, rows, hidden_states, groups, self.modules_of(plugin)
            )
        return self.decompression(plugin).expand(output, rows, hidden_states, groups, self.modules_of(plugin))

    def _check_reached_without_call(self) -> None:
        if self.merges_by_itself and not runs_single_blocks():
            raise RuntimeError(
                f"{self.name} has a Variator plugin and was reached outside of a call of its model, so nothing tells "
                "which of its tokens are neighbours. Call the model (or the module that takes input_ids or "
                "inputs_embeds and the attention mask), set the compression ratio to 1, or run the base model's "
                "layers inside `with model.disable_adapter():`."
            )

    def _check_output(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{self.name} gives a {type(output).__name__}, but a Variator plugin needs a network that gives its "
                "output alone, or first in a tuple. Name other modules where the feed-forward network starts and ends."
            )
        if not self.has_end and output.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name} takes vectors of {self.in_features} entries and gives vectors of {output.shape[-1]}, so "
                "it is only the start of a feed-forward network. Name the module where the network ends in end_module."
            )

    def _check_alone(self, hidden_states: Tensor, *others: Any) -> None:
        for other in others:
            if self.is_span and isinstance(other, Tensor):
                raise ValueError(
                    f"{self.name} starts a span (layer_spans), and takes a tensor of shape {tuple(other.shape)} "
                    "beside the hidden states, such as a mask or positions, which is not merged with them. Call the "
                    "model without a mask, or leave layer_spans out."
                )
            if isinstance(other, (tuple, list)):
                self._check_alone(hidden_states, *other)
            elif isinstance(other, Tensor) and other.dim() > 1 and hidden_states.shape[-2] in other.shape:
                raise ValueError(
                    f"{self.name} takes a second tensor of shape {tuple(other.shape)} beside the hidden states, such "
                    "as a residual, a mask or positions, which is not merged with them. Name modules inside of it "
                    "where the feed-forward network starts (target_modules) and ends (end_module)."
                )


def _without_full_mask(
    call: StackGroups, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer in a span, without the mask that transformers makes of ones in code that is traced."""

    def kept(value: Any) -> Any:
        is_mask = isinstance(value, Tensor) and value.dim() == 4  # (batch, heads, queries, keys)
        return None if is_mask and not call.has_mask else value

    return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}


def plugin_layers(model: nn.Module) -> Iterator[VariatorLayer]:
    """The layers of a model that have plugins."""
    return (module for module in model.modules() if isinstance(module, VariatorLayer))
