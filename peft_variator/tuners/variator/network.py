"""The inside of a feed-forward network: its neurons, where a decompression copies some of them.

y = Σ_j v_j·a_j(x) + b with a_j(x) = act(w_j·x + c_j), or act(w_j·x + c_j)·(u_j·x + e_j) where the network is gated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu
from transformers.pytorch_utils import Conv1D

from ...compat import is_quantized_tensor, tensor_version


__all__ = [
    "Network",
    "Stamp",
    "are_same",
    "bias_of",
    "features_of",
    "find_network",
    "is_map",
    "stamp",
    "stamps_of",
    "unwrapped",
    "weight_of",
]

Stamp = tuple[weakref.ref[Any], int]
"""A tensor (or a module without any) and how often it was written to: another one, where it may have other numbers."""

# Layers of PEFT's, and of the other method here, that add to a weight; others multiply it.
_ADDITIVE = ("LoraLayer", "LoHaLayer", "LoKrLayer", "SparseLoraLayer")
_ACTIVATIONS = ("act", "act_fn", "activation", "activation_fn", "gelu_impl", "intermediate_act_fn")


@dataclass(frozen=True)
class _Form:
    """How an implementation names its maps.

    Args:
        into: the map whose output is activated.
        out: the map that gives the output.
        gate: the map whose output multiplies the activated one.
        fused: whether `into` gives both, the activated half first.
    """

    into: str
    out: str
    gate: str | None = None
    fused: bool = False


# By the names that the modules of a network have in transformers; each is tried on the network before it is believed.
FORMS = (
    _Form("gate_proj", "down_proj", "up_proj"),
    _Form("gate_up_proj", "down_proj", fused=True),
    _Form("Wi", "Wo", fused=True),
    _Form("wi_0", "wo", "wi_1"),
    _Form("w1", "w2", "w3"),
    _Form("wi", "wo"),
    _Form("fc1", "fc2"),
    _Form("c_fc", "c_proj"),
    _Form("fc_in", "fc_out"),
    _Form("up_proj", "down_proj"),
    _Form("lin1", "lin2"),
    _Form("dense_h_to_4h", "dense_4h_to_h"),
    _Form("intermediate_dense", "output_dense"),
)


@dataclass(frozen=True, eq=False)
class Network:
    """The maps of a feed-forward network.

    Args:
        activation: act.
        into: gives w_j·x + c_j, and behind them u_j·x + e_j where `fused`.
        gate: gives u_j·x + e_j; `None`: the network has no gate, or `fused`.
        out: gives y.
        fused: see `into`.
    """

    activation: Callable[[Tensor], Tensor]
    into: nn.Module
    gate: nn.Module | None
    out: nn.Module
    fused: bool

    @property
    def width(self) -> int:
        """Number of neurons."""
        rows = features_of(self.into)[1]
        return rows // 2 if self.fused else rows

    @property
    def is_readable(self) -> bool:
        """Whether the weights can be read: they are in memory, plain, packed, or quantised in a form that is known."""
        return all(_has_readable_weight(module) for module in self.maps)

    @property
    def maps(self) -> list[nn.Module]:
        """The linear maps: `into`, `gate` if there is one, and `out`."""
        return [module for module in (self.into, self.gate, self.out) if module is not None]

    @property
    def gated(self) -> bool:
        """Whether neurons have a gate."""
        return self.fused or self.gate is not None

    def into_rows(self, index: Tensor, merged: bool = True) -> tuple[Tensor, Tensor]:
        """w and c of some neurons, shapes `(r, d)` and `(r,)`.

        Args:
            index: numbers of the neurons, shape `(r,)`.
            merged: as for `weight_of`, here and below.
        """
        return _rows(self.into, index, merged)

    def gate_rows(self, index: Tensor, merged: bool = True) -> tuple[Tensor, Tensor]:
        """u and e of some neurons, shapes `(r, d)` and `(r,)`."""
        if self.fused:
            return _rows(self.into, index + self.width, merged)
        assert self.gate is not None  # asked of gated networks only
        return _rows(self.gate, index, merged)

    def out_columns(self, index: Tensor, merged: bool = True) -> Tensor:
        """v of some neurons, shape `(d, r)`."""
        weight = weight_of(self.out, merged=merged)
        return weight.index_select(1, index.to(weight.device))

    def neurons(self, hidden_states: Tensor) -> Tensor:
        """a_j(x) of all neurons, shape `(…, width)`."""
        into = self.into(hidden_states)
        if self.fused:
            into, gate = into.chunk(2, dim=-1)
            return self.activation(into) * gate
        activated = self.activation(into)
        return activated if self.gate is None else activated * self.gate(hidden_states)

    def with_neurons_alone(self, hidden_states: Tensor, index: Tensor) -> Tensor:
        """The output with some neurons alone, Σ_j v_j·a_j(x) + b, shape `(…, d)`; their weights are copied meanwhile.

        Args:
            hidden_states: x, shape `(…, d)`.
            index: the numbers of the neurons, shape `(r,)`.
        """
        activated = self.activation(_sliced(self.into, hidden_states, index))
        if self.fused:
            activated = activated * _sliced(self.into, hidden_states, index + self.width)
        elif self.gate is not None:
            activated = activated * _sliced(self.gate, hidden_states, index)
        return _sliced(self.out, activated, index, of_inputs=True)

    def unsliceable_map(self) -> nn.Module | None:
        """A map that `with_neurons_alone` cannot take a part of: it has no plain weight in memory, or does more."""
        return next((module for module in self.maps if not _is_plain(_base_of(module))), None)

    def strengths(self) -> Tensor:
        """‖w_j‖·‖v_j‖ of all neurons, times ‖u_j‖ where gated: how much each can say; shape `(width,)`."""
        index = torch.arange(self.width)
        strength = self.into_rows(index)[0].float().norm(dim=1) * self.out_columns(index).float().norm(dim=0)
        return strength * self.gate_rows(index)[0].float().norm(dim=1) if self.gated else strength


def features_of(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear map."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]  # `is_map` looked


def weight_of(module: nn.Module, dequantize: bool = True, merged: bool = True) -> Tensor:
    """The weight of a linear map as plain numbers, shape `(out_features, in_features)`.

    Args:
        module: the map, or PEFT's wrapper of one.
        dequantize: whether a quantised weight of torch's is turned into plain numbers.
        merged: whether adapters that are merged into the weight count. `False`: it is the weight without them.

    Raises:
        ValueError: an adapter is merged in a way that cannot be taken off.
    """
    inner = unwrapped(module)
    weight: Any = inner.weight() if callable(inner.weight) else inner.weight  # torch's quantised layers have a method
    if hasattr(weight, "unpack"):  # of a packed base
        weight = weight.unpack()
    elif hasattr(weight, "quant_state"):  # of bitsandbytes
        weight = dequantize_module_weight(inner)
    elif dequantize and (weight.is_quantized or is_quantized_tensor(weight)):
        weight = weight.dequantize()
    assert isinstance(weight, Tensor)  # `is_readable` says so
    while not merged and isinstance(module, BaseTunerLayer):  # of several methods, one around the other
        for name in module.merged_adapters:
            delta = _merged_delta(module, name)
            weight = weight if delta is None else weight.detach() - delta.to(weight)
        module = cast(Any, module).base_layer
    return weight.detach().t() if isinstance(inner, Conv1D) else weight.detach()


def _merged_delta(module: Any, name: str) -> Tensor | None:
    """What an adapter has added to the weight of a map, in the weight's own shape; `None`: it was deleted since."""
    if name not in module._get_available_adapters():
        return None  # it is part of the base now
    adds = any(kind.__name__ in _ADDITIVE for kind in type(module).__mro__)
    if not adds or name in getattr(module, "lora_variant", ()):
        raise ValueError(
            f"The adapter {name!r} is merged into a weight that a Variator plugin reads without adapters, and a "
            f"{type(module).__name__} can't tell what it has added. Unmerge it first, or use a plugin with whole "
            "copies."
        )
    delta = module.get_delta_weight(name)
    assert isinstance(delta, Tensor)  # what PEFT's layers give
    return delta.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear map, shape `(out_features,)`; `None`: it has none."""
    inner = unwrapped(module)
    bias = inner.bias() if callable(inner.bias) else inner.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def unwrapped(module: nn.Module) -> Any:
    """A linear map without the wrappers of PEFT around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def stamps_of(module: nn.Module) -> list[Stamp]:
    """Of all that a map (or PEFT's wrapper of one) holds itself; writing through `.data` leaves no trace."""
    inner = unwrapped(module)
    tensors = [each for each in (*inner._parameters.values(), *inner._buffers.values()) if each is not None]
    return [stamp(each) for each in tensors] or [(weakref.ref(inner), 0)]


def are_same(stamps: list[Stamp], others: list[Stamp]) -> bool:
    """Whether stamps are of the same tensors, and none was written to between."""
    pairs = zip(stamps, others, strict=False)
    return len(stamps) == len(others) and all(a() is not None and a() is b() and n == m for (a, n), (b, m) in pairs)


def stamp(tensor: Tensor) -> Stamp:
    """Of one tensor, which it does not keep in memory."""
    return weakref.ref(tensor), tensor_version(tensor)


def _rows(module: nn.Module, index: Tensor, merged: bool) -> tuple[Tensor, Tensor]:
    weight, bias = weight_of(module, merged=merged), bias_of(module)
    rows = weight.index_select(0, index.to(weight.device))
    if bias is None:
        return rows, rows.new_zeros(rows.shape[0])
    return rows, bias.index_select(0, index.to(bias.device))


def _base_of(module: nn.Module) -> nn.Module:
    """A map without the low-rank update that a plugin with `compensation_rank` adds to it."""
    base: Any = module.base_layer if hasattr(module, "current_update") else module
    return base


def _update_of(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
    """A and B of that update in this call, if there is one."""
    update: Any = getattr(module, "current_update", None)
    found = None if update is None else update(inputs)
    return None if found is None else found[1:]


def _is_plain(module: nn.Module) -> bool:
    # Falcon's is a linear map that only rounds the product before it adds the bias.
    if type(module) not in (nn.Linear, Conv1D) and type(module).__name__ != "FalconLinear":
        return False
    weight: Any = module.weight
    return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta


def _plain_weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight, shape `(out_features, in_features)`, and bias, as they are."""
    weight: Any = module.weight
    bias: Any = module.bias
    return weight.t() if isinstance(module, Conv1D) else weight, bias


def _sliced(module: nn.Module, inputs: Tensor, index: Tensor, of_inputs: bool = False) -> Tensor:
    """Some of the outputs of a map, or what it gives `of_inputs` of these numbers, all others being 0."""
    update = _update_of(module, inputs)
    weight, bias = _plain_weight(_base_of(module))
    index = index.to(weight.device)
    if bias is not None and not of_inputs:
        bias = bias.index_select(0, index)
    output = linear(inputs, weight.index_select(int(of_inputs), index), bias)
    if update is None:
        return output
    down, up = (part.to(inputs.dtype) for part in update)
    down, up = (down.index_select(1, index), up) if of_inputs else (down, up.index_select(0, index))
    return output + linear(linear(inputs, down), up).to(output.dtype)


def is_map(module: object) -> bool:
    """Whether a module is a linear map, quantised or not, or PEFT's wrapper of one."""
    return isinstance(module, Conv1D) or (
        isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def _has_readable_weight(module: nn.Module) -> bool:
    """Whether the weight of a linear map is in memory, in a form that can be turned into plain numbers."""
    inner = unwrapped(module)
    weight = getattr(inner, "weight", None)
    is_packed = callable(weight)  # by torch's own quantisation, in float16 too
    if callable(weight):
        weight = weight()
    if not isinstance(weight, Tensor) or weight.is_meta:
        return False
    if any(hasattr(weight, name) for name in ("unpack", "quant_state")) or weight.is_quantized:
        return True
    if is_quantized_tensor(weight):
        return hasattr(weight, "dequantize")
    return (is_packed or isinstance(inner, nn.Linear | Conv1D)) and weight.is_floating_point()


def find_network(start: nn.Module, parent: nn.Module, end: nn.Module | None) -> Network | None:
    """The maps of a feed-forward network, or `None` where its inside is not known, as in a mixture of experts.

    Args:
        start: the module where it starts.
        parent: the module that holds `start`, and an activation between two loose maps.
        end: the module where it ends; `None`: `start` is the whole network.
    """
    for network in _candidates(start, parent, end):
        if _computes_the_same(network, start, parent, end):
            return network
    return None


def _candidates(start: nn.Module, parent: nn.Module, end: nn.Module | None) -> Iterator[Network]:
    if end is None:
        for form in FORMS:
            into, out = getattr(start, form.into, None), getattr(start, form.out, None)
            gate = None if form.gate is None else getattr(start, form.gate, None)
            if is_map(into) and is_map(out) and (form.gate is None or is_map(gate)):
                for activation in _activations(start):
                    yield Network(activation, cast(nn.Module, into), gate, cast(nn.Module, out), form.fused)
        return
    into = start if is_map(start) else getattr(start, "dense", None)
    if is_map(into) and is_map(end):
        for activation in _activations(start, parent):
            yield Network(activation, cast(nn.Module, into), None, end, False)


def _activations(*modules: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    found: list[Any] = [getattr(module, name, None) for module in modules for name in _ACTIVATIONS]
    activations = [activation for activation in found if callable(activation)]
    # Some call a function that they do not hold; which one, what they give tells, but of a linear map by itself.
    return activations if activations or is_map(modules[0]) else [gelu, silu]


@torch.no_grad()
def _computes_the_same(network: Network, start: nn.Module, parent: nn.Module, end: nn.Module | None) -> bool:
    """Whether the maps, put together, give what the network gives for a few vectors."""
    if features_of(network.out)[0] != network.width:
        return False
    like = next((p for module in (start, end or start) for p in module.parameters() if p.is_floating_point()), None)
    probe = torch.randn(1, 3, features_of(network.into)[0], generator=torch.Generator().manual_seed(0))
    if like is not None:
        if like.is_meta:
            return False
        probe = probe.to(like)
    training = [module for module in start.modules() if module.training]
    for module in training:
        module.training = False  # no dropout for the length of a call
    try:
        found = network.out(network.neurons(probe))
        expected = start(probe)
        if end is not None:
            # Between two loose maps the activation is the block's.
            expected = end(network.activation(expected) if is_map(start) else expected)
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return False
    finally:
        for module in training:
            module.training = True
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= 1e-2 * expected.abs().max())  # in half precision, too
