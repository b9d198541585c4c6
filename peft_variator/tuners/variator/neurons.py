"""The copies of a network's neurons that a plugin brings: which they are, and what they have become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...field_types import check_memory
from .linear_maps import RoundedRows, RowsOfBase, UpdatedRows
from .network import Network


if TYPE_CHECKING:  # which asks the decompressions what may be chosen
    from .config import VariatorConfig


__all__ = [
    "NeuronIndex",
    "copy_neurons",
    "create_copies",
    "has_left_its_start",
    "read_rows",
    "weights_of",
]

Modules = Mapping[str, nn.Module]


class NeuronIndex(nn.Module):
    """S, which neurons of a network a plugin has copies of.

    Args:
        index: their numbers, shape `(r,)`.
        activation: act, that of the network.
        is_sliced: whether the network runs without them at rows of groups.
    """

    index: Tensor

    def __init__(self, index: Tensor, activation: Callable[[Tensor], Tensor], is_sliced: bool = False) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self._activation = (activation,)  # in a tuple: the module is the network's
        self.is_calibrated = False
        self.is_sliced = is_sliced
        self._rest: tuple[Tensor, Tensor] | None = None
        self.read_for: Tensor | None = None
        """The index that the base model's rows were read for, where the plugin reads them (`reads_base`)."""
        self.register_load_state_dict_post_hook(_forget)

    def forward(self, inputs: Tensor) -> Tensor:
        """The activation."""
        return self._activation[0](inputs)

    def rest(self, width: int) -> Tensor:
        """The numbers of all other neurons of a network of `width`, shape `(width − r,)`."""
        if self._rest is None or self._rest[0] is not self.index:
            # Kept for calls that train, too, so no tensor of inference mode.
            with torch.inference_mode(False):
                self._rest = self.index, (~self.flags(width)).nonzero().flatten()
        return self._rest[1]

    def forget(self) -> None:
        """Drop what was found out about the neurons, since their numbers were written over."""
        self._rest = None

    def flags(self, width: int) -> Tensor:
        """Which neurons of a network of `width` are copied, shape `(width,)`."""
        none = torch.zeros(width, dtype=torch.bool, device=self.index.device)
        # In a file the numbers may have 32 bits. An int: torch.jit.trace has no such operator for a bool.
        return none.index_fill(0, self.index.long(), 1)

    def has_read(self) -> bool:
        """Whether the base model's rows were read for these neurons."""
        if self.read_for is None or self.read_for is self.index or torch.compiler.is_compiling():
            return self.read_for is not None  # a compiler makes tensors of its own
        if not torch.equal(self.read_for.cpu(), self.index.cpu()):
            return False
        self.read_for = self.index  # moved to another device, say
        return True


def create_copies(dim: int, config: VariatorConfig, network: Network, name: str) -> dict[str, nn.Module]:
    """New copies, of the neurons that can say most: those with the largest ‖w_j‖·‖v_j‖.

    Args:
        dim: d, width of the hidden states.
        config: the plugin's configuration.
        network: the base model's network.
        name: full name of the module where it starts, in the base model.

    Raises:
        ValueError: the network has too few neurons; or what is kept is added to the base model's rows, and these
            can't be read, or the plugin is new and was never shrunk.
    """
    width, rank, bits = config.correction_width(network.width, name), config.correction_rank, config.correction_bits
    if config.reads_base and not network.is_readable:
        field_name = "correction_bits" if rank is None else "correction_rank"
        raise ValueError(
            f"{field_name}={getattr(config, field_name)} adds to rows of the base model's feed-forward networks, "
            "whose weights cannot be read here, as they are on disk or in a form that nothing turns back into "
            f"numbers. Load the base in memory, or use a plugin with {field_name}=None."
        )
    if bits is not None and not config.was_saved:
        raise ValueError(
            f"correction_bits={bits}: rounded copies are not trained, so a new plugin has none. Leave it out, and "
            "call peft_variator.shrink_plugin(model, bits) once the plugin is trained."
        )

    if rank is not None:
        check_memory("correction_rank", rank, rank * (dim + width), min(dim, width), name)

    def new_map(in_features: int, out_features: int, bias: bool) -> nn.Module:
        if bits is not None:
            return RoundedRows(in_features, out_features, bits, bias)
        if rank is None:
            return nn.Linear(in_features, out_features, bias=bias)
        return UpdatedRows(in_features, out_features, rank, bias)

    index = torch.arange(width)
    if network.is_readable:
        index = network.strengths().topk(width).indices.sort().values.cpu()
    modules: dict[str, nn.Module] = {
        "variator_neurons": NeuronIndex(index, network.activation, config.correction_form == "sliced"),
        "variator_neuron_into": new_map(dim, width, True),
        "variator_neuron_out": new_map(width, dim, False),
    }
    if network.gated:
        modules["variator_neuron_gate"] = new_map(dim, width, True)
    if network.is_readable and not (config.reads_base and config.was_saved):  # else the file says whose rows are read
        if config.init_weights:
            copy_neurons(modules, network, index)
        elif rank is not None:
            read_rows(modules, network)
    return modules


def _forget(module: nn.Module, _: object) -> None:
    """Loading writes over the numbers in place."""
    assert isinstance(module, NeuronIndex)  # which registers this
    module.forget()


def copy_neurons(modules: Modules, network: Network, index: Tensor) -> None:
    """Set a plugin's copies to neurons of the base model.

    Args:
        modules: what `create_copies` made.
        network: the base model's network.
        index: numbers of the neurons, shape `(r,)`.
    """
    neurons = _index_of(modules)
    with torch.no_grad():
        neurons.index.copy_(index)
        neurons.forget()
        for part, (weight, bias) in weights_of(network, index).items():
            module = modules[part]
            if isinstance(module, UpdatedRows):
                module.B.zero_()
            else:
                module.get_parameter("weight").copy_(weight)
            if bias is not None:
                module.get_parameter("bias").copy_(bias)
        read_rows(modules, network)


def has_left_its_start(modules: Modules, network: Network) -> bool:
    """Whether a plugin's copies differ from the base model's neurons."""
    for part, (weight, bias) in weights_of(network, _index_of(modules).index).items():
        module = modules[part]
        if isinstance(module, RoundedRows):
            return True  # that is done to trained ones
        if isinstance(module, UpdatedRows):
            if bool(module.B.any()):
                return True
        elif not _equal(module.get_parameter("weight"), weight):
            return True
        if bias is not None and not _equal(module.get_parameter("bias"), bias):
            return True
    return False


def read_rows(modules: Modules, network: Network) -> None:
    """Read the base model's rows anew, for copies of which only an update or a difference is kept.

    Args:
        modules: what `create_copies` made.
        network: the base model's network.
    """
    neurons = _index_of(modules)
    added = {part: module for part, module in modules.items() if isinstance(module, RowsOfBase)}
    weights = weights_of(network, neurons.index, merged=False) if added else {}
    for part, module in added.items():
        module.set_rows(weights[part][0])
    neurons.read_for = neurons.index


def _index_of(modules: Modules) -> NeuronIndex:
    neurons = modules["variator_neurons"]
    assert isinstance(neurons, NeuronIndex)  # what `create_copies` made
    return neurons


def weights_of(network: Network, index: Tensor, merged: bool = True) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of some of the base model's neurons, by the plugin's part.

    Args:
        network: the base model's network.
        index: numbers of the neurons, shape `(r,)`.
        merged: whether adapters that are merged into the weights count. What is added to the base model's rows is
            added to those without: they are the same whether an adapter is merged or not.
    """
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        "variator_neuron_into": network.into_rows(index, merged),
        "variator_neuron_out": (network.out_columns(index, merged), None),
    }
    if network.gated:
        found["variator_neuron_gate"] = network.gate_rows(index, merged)
    return found


def _equal(parameter: nn.Parameter, start: Tensor) -> bool:
    return torch.equal(parameter, start.to(parameter))
