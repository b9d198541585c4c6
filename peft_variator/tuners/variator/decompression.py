"""How a row's output is given back to its tokens: one class a decompression.

`VariatorConfig(decompression=…)` chooses one by name. To add one, write a subclass of [`Decompression`] here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ...field_types import check_memory
from .fused import expand_rows, runs_fused
from .linear_maps import RowsOfBase, apply_linear, is_quantized_map
from .merging import Groups, PackedGroups
from .network import Network
from .neurons import Modules, NeuronIndex, create_copies


if TYPE_CHECKING:  # which asks here what may be chosen
    from .config import VariatorConfig


__all__ = ["DECOMPRESSIONS", "BottleneckDecompression", "Decompression", "NeuronsDecompression", "neuron_outputs"]


class Decompression:
    """Gives every token of a group the network's output for the group, and a correction of its own.

    A token by itself has no correction. The weights of a plugin are modules by the names of `parts`: in a plugin's
    file, a tensor's name starts with that of its part.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def serves(self, network: Network | None, config: VariatorConfig) -> bool:
        """Whether it can stand behind a feed-forward network; `None` is one whose inside is not known."""
        return True

    def create(self, dim: int, config: VariatorConfig, network: Network | None, name: str) -> dict[str, nn.Module]:
        """The weights of a plugin, by part.

        Args:
            dim: d, width of the hidden states.
            config: the plugin's configuration.
            network: the feed-forward network; `None`: its inside is not known.
            name: full name of the module where it starts, in the base model.
        """
        raise NotImplementedError

    def expand(self, output: Tensor, rows: Tensor, hidden_states: Tensor, groups: Groups, modules: Modules) -> Tensor:
        """What every token gets.

        Args:
            output: output of the feed-forward network, shape `(sequences, rows, d)`.
            rows: its input, the merged vectors, in the same shape.
            hidden_states: the vectors before merging, shape `(batch, length, d)` or `(batch * length, d)`.
            groups: the groups.
            modules: what `create` made.

        Returns:
            The shape of `hidden_states`; zero at padding.
        """
        raise NotImplementedError


class BottleneckDecompression(Decompression):
    """The paper's: `Linear(2d → r), tanh, Linear(r → d)` on the row's output and the token's input, side by side.

    Xiao et al. 2023, section 3.2. The first map is split in two, so that the part of the output is computed once for a
    group: W[y; x] = W₁·y + W₂·x. With `output_bias` the last map has a bias, as in the paper's code.
    """

    name = "bottleneck"
    parts = ("variator_down_input", "variator_down_output", "variator_up")

    def create(self, dim: int, config: VariatorConfig, network: Network | None, name: str) -> dict[str, nn.Module]:
        width = config.bottleneck_width
        check_memory("bottleneck_dim (or correction_dim)", width, 3 * dim * width, 2 * dim, name)
        up = nn.Linear(width, dim, bias=config.output_bias)
        if config.init_weights:
            for parameter in up.parameters():
                nn.init.zeros_(parameter)
        return {
            "variator_down_input": nn.Linear(dim, width, bias=False),
            "variator_down_output": nn.Linear(dim, width),
            "variator_up": up,
        }

    def expand(self, output: Tensor, rows: Tensor, hidden_states: Tensor, groups: Groups, modules: Modules) -> Tensor:
        outputs, tokens = output.flatten(0, -2), hidden_states.flatten(0, -2)
        per_row = apply_linear(modules["variator_down_output"], outputs)
        per_token = apply_linear(modules["variator_down_input"], tokens)
        up = modules["variator_up"]
        if not is_quantized_map(up) and runs_fused(per_token, per_row):
            assert isinstance(up, nn.Linear)  # what `create` made
            bias = None if up.bias is None else up.bias.to(per_token.dtype)
            weight, outputs = up.weight.to(per_token.dtype), outputs.to(per_token.dtype)
            return expand_rows(outputs, per_token, per_row, weight, bias, groups, "tanh").view(hidden_states.shape)
        # Masked before the tanh: a token by itself, and padding, get tanh(0) = 0 and so no correction.
        inner = groups.only_merged(per_token + groups.spread(per_row)).tanh()
        if is_quantized_map(up):
            # Its bias, if it has one, is inside, and counts for the tokens that are merged.
            def correct(inner: Tensor) -> Tensor:
                return torch.where(groups.is_merged, apply_linear(up, inner), 0)

            return groups.expand(outputs.to(inner.dtype), inner, correct).view(hidden_states.shape)
        assert isinstance(up, nn.Linear)  # what `create` made
        expanded = groups.expand(outputs.to(inner.dtype), inner, up.weight.to(inner.dtype))
        if up.bias is not None:
            expanded = expanded + torch.where(groups.is_merged, up.bias.to(inner.dtype), 0)
        return expanded.view(hidden_states.shape)


class NeuronsDecompression(Decompression):
    """A narrow copy of the network: y = F(m) + Σ_{j∈S} v_j·(a_j(x) − a_j(m)), the r neurons S run for every token.

    F(m) is the network's output for the token's group, m its merged vector. The copies w, u, v of the neurons' weights
    start as the base model's and are trained; the base model is only called, so it may be quantised or packed later.
    Untrained and with S all neurons, a token gets what the base model gives, F(x). With `correction_rank` the copies
    are the base model's rows with a low-rank update, see [`UpdatedRows`], and with
    `correction_bits` those rows with a rounded difference, see [`RoundedRows`].

    With `correction_form="sliced"` the layer runs the network without S at rows of groups, F₋S(m), and nothing is
    taken off: y = F₋S(m) + Σ_{j∈S} v_j·a_j(x), the same as long as the copies are the base model's neurons.
    """

    name = "neurons"
    parts = ("variator_neurons", "variator_neuron_into", "variator_neuron_gate", "variator_neuron_out")

    def serves(self, network: Network | None, config: VariatorConfig) -> bool:
        # The copies of a plugin that was saved are in its file.
        return network is not None and (network.is_readable or config.was_saved)

    def create(self, dim: int, config: VariatorConfig, network: Network | None, name: str) -> dict[str, nn.Module]:
        assert network is not None  # `serves` says so
        return create_copies(dim, config, network, name)

    def expand(self, output: Tensor, rows: Tensor, hidden_states: Tensor, groups: Groups, modules: Modules) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        out, neurons = modules["variator_neuron_out"], modules["variator_neurons"]
        assert isinstance(neurons, NeuronIndex)
        merged = groups.merged_alone()
        unmasked = neuron_outputs(modules, tokens if merged is None else tokens.index_select(0, merged))
        rest = output.flatten(0, -2).to(unmasked.dtype)
        up: Tensor | Callable[[Tensor], Tensor]
        if is_quantized_map(out) or (isinstance(out, RowsOfBase) and out.quantized_map() is not None):
            up = partial(apply_linear, out)
        else:
            assert isinstance(out, nn.Linear | RowsOfBase)  # what `create` made
            up = out.weight.to(unmasked.dtype)
            if merged is None and runs_fused(unmasked, rest, up):
                of_rows = None if neurons.is_sliced else self._neurons_of_rows(rows.to(tokens.dtype), groups, modules)
                prologue = "plain" if of_rows is None else "difference"
                return expand_rows(rest, unmasked, of_rows, up, None, groups, prologue).view(hidden_states.shape)
        if not neurons.is_sliced:
            # The row's neurons are taken off before it is spread: there are fewer rows than tokens, and d < r.
            rest = self._without_neurons(rest, rows.to(tokens.dtype), up, groups, modules)
        # A token by itself, and padding, have no correction.
        if merged is None:
            expanded = groups.expand(rest, groups.only_merged(unmasked), up)
        else:
            correction = up(unmasked) if callable(up) else unmasked @ up.t()
            expanded = groups.spread(rest).index_add_(0, merged, correction)
        return expanded.view(hidden_states.shape)

    @staticmethod
    def _neurons_of_rows(rows: Tensor, groups: Groups, modules: Modules) -> Tensor:
        """What the copies give for rows, or for the first ones alone where these are all that tokens share."""
        if isinstance(groups, PackedGroups) and groups.can_split:
            rows, _ = groups.split(rows)
        return neuron_outputs(modules, rows.flatten(0, -2))

    @staticmethod
    def _without_neurons(
        output: Tensor,
        rows: Tensor,
        up: Tensor | Callable[[Tensor], Tensor],
        groups: Groups,
        modules: Modules,
    ) -> Tensor:
        """The output of rows without what the copies give for them where tokens share them; `(num_rows, d)`."""
        if not isinstance(groups, PackedGroups) and groups.merged_alone() is not None:
            # Most rows are single tokens, so these are set aside, though that copies.
            merged, _ = groups.split(rows)
            of_groups, of_singles = groups.split(output.view(*rows.shape[:-1], -1))
            inner = neuron_outputs(modules, merged.flatten(0, -2))
            return groups.join(_less(of_groups.flatten(0, -2), inner, up).view_as(of_groups), of_singles).flatten(
                0, -2
            )
        of_rows = NeuronsDecompression._neurons_of_rows(rows, groups, modules)
        if isinstance(groups, PackedGroups) and groups.can_split:  # the rows of groups are the first ones
            first = of_rows.shape[0]
            return torch.cat([_less(output[:first], of_rows, up), output[first:]])
        return _less(output, torch.where(groups.rows_that_merge(), of_rows, 0), up)


DECOMPRESSIONS: dict[str, Decompression] = {
    decompression.name: decompression() for decompression in (BottleneckDecompression, NeuronsDecompression)
}
"""All decompressions by the name that `VariatorConfig` takes."""


def neuron_outputs(modules: Modules, inputs: Tensor) -> Tensor:
    """a_j(x) of a plugin's copies, shape `(…, r)`.

    Args:
        modules: what `NeuronsDecompression.create` made.
        inputs: x, shape `(…, d)`.
    """
    activated = modules["variator_neurons"](apply_linear(modules["variator_neuron_into"], inputs))
    gate = modules.get("variator_neuron_gate")
    return activated if gate is None else activated * apply_linear(gate, inputs)


def _less(output: Tensor, inner: Tensor, up: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    """`output − inner @ up.T`."""
    return torch.addmm(output, inner, up.t(), alpha=-1) if isinstance(up, Tensor) else output - up(inner)
