"""How a row's output is given back to its tokens: one class a decompression.

`VariatorConfig(decompression=…)` chooses one by name. To add one, write a subclass of [`Decompression`] here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .config import VariatorConfig
from .merging import Groups
from .network import Network


__all__ = [
    "DECOMPRESSIONS",
    "BottleneckDecompression",
    "Decompression",
    "NeuronsDecompression",
    "copy_neurons",
    "has_left_its_start",
]

Modules = Mapping[str, nn.Module]


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

    def create(self, dim: int, config: VariatorConfig, network: Network | None) -> dict[str, nn.Module]:
        """The weights of a plugin, by part.

        Args:
            dim: d, width of the hidden states.
            config: the plugin's configuration.
            network: the feed-forward network; `None`: its inside is not known.
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

    def create(self, dim: int, config: VariatorConfig, network: Network | None) -> dict[str, nn.Module]:
        up = nn.Linear(config.bottleneck_dim, dim, bias=config.output_bias)
        if config.init_weights:
            for parameter in up.parameters():
                nn.init.zeros_(parameter)
        return {
            "variator_down_input": nn.Linear(dim, config.bottleneck_dim, bias=False),
            "variator_down_output": nn.Linear(dim, config.bottleneck_dim),
            "variator_up": up,
        }

    def expand(self, output: Tensor, rows: Tensor, hidden_states: Tensor, groups: Groups, modules: Modules) -> Tensor:
        outputs, tokens = output.flatten(0, -2), hidden_states.flatten(0, -2)
        per_row = _linear(modules["variator_down_output"], outputs)
        per_token = _linear(modules["variator_down_input"], tokens)
        # Masked before the tanh: a token by itself, and padding, get tanh(0) = 0 and so no correction.
        inner = torch.where(groups.is_merged, per_token + groups.spread(per_row), 0).tanh()
        up = modules["variator_up"]
        assert isinstance(up, nn.Linear)  # what `create` made
        expanded = groups.expand(outputs.to(inner.dtype), inner, up.weight.to(inner.dtype))
        if up.bias is not None:
            expanded = expanded + torch.where(groups.is_merged, up.bias.to(inner.dtype), 0)
        return expanded.view(hidden_states.shape)


class NeuronIndex(nn.Module):
    """S, which neurons of a network a plugin has copies of.

    Args:
        index: their numbers, shape `(r,)`.
        activation: act, that of the network.
    """

    index: Tensor

    def __init__(self, index: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self._activation = (activation,)  # in a tuple: the module is the network's
        self.is_calibrated = False

    def forward(self, inputs: Tensor) -> Tensor:
        """The activation."""
        return self._activation[0](inputs)


class NeuronsDecompression(Decompression):
    """A narrow copy of the network: y = F(m) + Σ_{j∈S} v_j·(a_j(x) − a_j(m)), the r neurons S run for every token.

    F(m) is the network's output for the token's group, m its merged vector. The copies w, u, v of the neurons' weights
    start as the base model's and are trained; the base model is only called, so it may be quantised or packed later.
    Untrained and with S all neurons, a token gets what the base model gives, F(x).
    """

    name = "neurons"
    parts = ("variator_neurons", "variator_neuron_into", "variator_neuron_gate", "variator_neuron_out")

    def serves(self, network: Network | None, config: VariatorConfig) -> bool:
        # The copies of a plugin that was saved are in its file.
        return network is not None and (network.is_readable or config.was_saved)

    def create(self, dim: int, config: VariatorConfig, network: Network | None) -> dict[str, nn.Module]:
        assert network is not None  # `serves` says so
        width = config.correction_width(network.width)
        index = torch.arange(width)
        if network.is_readable:  # without data: those that can say most
            index = network.strengths().topk(width).indices.sort().values.cpu()
        modules: dict[str, nn.Module] = {
            "variator_neurons": NeuronIndex(index, network.activation),
            "variator_neuron_into": nn.Linear(dim, width),
            "variator_neuron_out": nn.Linear(width, dim, bias=False),
        }
        if network.gated:
            modules["variator_neuron_gate"] = nn.Linear(dim, width)
        if config.init_weights and network.is_readable:
            copy_neurons(modules, network, index)
        return modules

    def expand(self, output: Tensor, rows: Tensor, hidden_states: Tensor, groups: Groups, modules: Modules) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        of_tokens = _neurons(modules, tokens)
        of_rows = _neurons(modules, rows.flatten(0, -2).to(tokens.dtype))
        inner = torch.where(groups.is_merged, of_tokens - groups.spread(of_rows), 0)
        out = modules["variator_neuron_out"]
        assert isinstance(out, nn.Linear)  # what `create` made
        outputs = output.flatten(0, -2).to(inner.dtype)
        return groups.expand(outputs, inner, out.weight.to(inner.dtype)).view(hidden_states.shape)


def copy_neurons(modules: Modules, network: Network, index: Tensor) -> None:
    """Set a plugin's copies to neurons of the base model.

    Args:
        modules: what `NeuronsDecompression.create` made.
        network: the base model's network.
        index: numbers of the neurons, shape `(r,)`.
    """
    with torch.no_grad():
        for part, value in _start(modules, network, index).items():
            for name, tensor in value.items():
                modules[part].get_parameter(name).copy_(tensor)
        neurons = modules["variator_neurons"]
        assert isinstance(neurons, NeuronIndex)  # what `create` made
        neurons.index.copy_(index)


def has_left_its_start(modules: Modules, network: Network) -> bool:
    """Whether a plugin's copies differ from the base model's neurons."""
    neurons = modules["variator_neurons"]
    assert isinstance(neurons, NeuronIndex)  # what `create` made
    start = _start(modules, network, neurons.index)
    return any(
        not torch.equal(modules[part].get_parameter(name), tensor.to(modules[part].get_parameter(name)))
        for part, value in start.items()
        for name, tensor in value.items()
    )


def _start(modules: Modules, network: Network, index: Tensor) -> dict[str, dict[str, Tensor]]:
    """What a plugin's copies start as, by part and parameter."""
    into, bias = network.into_rows(index)
    start = {
        "variator_neuron_into": {"weight": into, "bias": bias},
        "variator_neuron_out": {"weight": network.out_columns(index)},
    }
    if network.gated:
        gate, gate_bias = network.gate_rows(index)
        start["variator_neuron_gate"] = {"weight": gate, "bias": gate_bias}
    return start


def _neurons(modules: Modules, inputs: Tensor) -> Tensor:
    """a_j(x) of the copies, shape `(…, r)`."""
    activated = modules["variator_neurons"](_linear(modules["variator_neuron_into"], inputs))
    gate = modules.get("variator_neuron_gate")
    return activated if gate is None else activated * _linear(gate, inputs)


DECOMPRESSIONS: dict[str, Decompression] = {
    decompression.name: decompression() for decompression in (BottleneckDecompression, NeuronsDecompression)
}
"""All decompressions by the name that `VariatorConfig` takes."""


def _linear(module: nn.Module, inputs: Tensor) -> Tensor:
    """A linear map in the dtype of its input: the small plugin follows the activations."""
    assert isinstance(module, nn.Linear)  # what `create` made
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return linear(inputs, module.weight.to(inputs.dtype), bias)
