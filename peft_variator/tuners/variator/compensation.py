"""A low-rank update of the maps of a plugin's block, active only while the plugin merges.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) inside of the plugin: y = W·x + B·A·x, on the attention's maps
for every token, and on the maps of the feed-forward network for the merged rows. A starts at random and B at zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...compat import is_plain_linear
from ...field_types import check_memory
from .config import VariatorConfig
from .layer import PluginModule, VariatorLayer
from .linear_maps import FloatLinear, RoundedFactor, SummedMap, apply_linear, as_linear
from .network import bias_of, features_of, is_map, weight_of
from .placement import Placement, block_of


__all__ = ["CompensatedLinear", "compensate"]


class CompensatedLinear(SummedMap, PluginModule):
    """A linear map of a block whose feed-forward network has a plugin.

    Args:
        base_layer: the map, quantised or not, or another method's wrapper of one.
        network_name: full name of the module where the plugin is: its choices count here too.
    """

    adapter_layer_names: tuple[str, ...] = ("variator_compensation_A", "variator_compensation_B")

    def __init__(self, base_layer: nn.Module, network_name: str) -> None:
        super().__init__(base_layer, 0)
        self.in_features, self.out_features = features_of(base_layer)
        self.network_name = network_name
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ModuleDict())
        self.quantized = {}  # by plugin
        self.register_load_state_dict_post_hook(_forget_sums)

    def adapters(self) -> set[str]:
        """The plugins that have an update here."""
        return set(getattr(self, self.adapter_layer_names[0]))

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A, shape `(rank, in_features)`, and B, shape `(out_features, rank)`, of a plugin's update."""
        down, up = (getattr(self, part)[adapter_name].weight for part in self.adapter_layer_names)
        return down, up

    @torch.no_grad()
    def rounded(self, adapter_name: str) -> Iterator[tuple[str, RoundedFactor]]:
        """A and B of a plugin in few bits, with the names of what they take the place of."""
        factors = self.factors(adapter_name)
        for part, weight, is_up in zip(self.adapter_layer_names, factors, (False, True), strict=True):
            factor = RoundedFactor(weight.shape[1], weight.shape[0], is_up=is_up)
            factor.to(weight.device).to(weight.dtype).train(self.training)
            factor.set_weight(weight)
            yield part, factor

    def summed(self, adapter_name: str) -> nn.Linear:
        """W + B·A of a plugin as a map in floating point, in float32 or better."""
        down, up = self.factors(adapter_name)
        weight, bias = weight_of(self.base_layer), bias_of(self.base_layer)
        dtype = torch.promote_types(up.dtype, torch.float32)
        with torch.no_grad():
            weight = torch.addmm(weight.to(up), up, down).to(dtype)
            return as_linear(weight, None if bias is None else bias.to(weight))

    def update_layer(self, adapter_name: str, config: VariatorConfig) -> None:
        """Add the update of a plugin, or make it anew."""
        rank = config.compensation_rank
        assert rank is not None  # `compensate` asks
        widths = (self.in_features, self.out_features)
        check_memory("compensation_rank", rank, rank * sum(widths), min(widths), self.network_name)
        down: nn.Module
        up: nn.Module
        if config.compensation_bits is not None:  # of a plugin that was shrunk, whose file has the numbers
            down = RoundedFactor(self.in_features, rank, is_up=False)
            up = RoundedFactor(rank, self.out_features, is_up=True)
        else:
            down = FloatLinear(self.in_features, rank, bias=False)
            up = FloatLinear(rank, self.out_features, bias=False)
            if config.init_weights:
                nn.init.zeros_(up.weight)
        for part, module in zip(self.adapter_layer_names, (down, up), strict=True):
            getattr(self, part)[adapter_name] = module
        self.quantized.pop(adapter_name, None)
        with self.as_new():
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a plugin's update; see `BaseTunerLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self.quantized.pop(adapter_name, None)

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The map, and the update of the plugin that merges in the call under way, if there is one.

        Args:
            inputs: shape `(…, in_features)`.
        """
        update = self.current_update(inputs)
        if update is None:
            return self.base_layer(inputs, *args, **kwargs)
        (name, down, up), base = update, self.base_layer
        quantized = self.quantized_sum(name, up)
        if quantized is not None:
            return apply_linear(quantized, inputs)
        if is_plain_linear(base) and self._pays_to_sum(inputs, base.weight, down, up):
            return linear(inputs, torch.addmm(base.weight, up, down), base.bias)
        output = self.base_layer(inputs, *args, **kwargs)
        if inputs.dim() > 1 and inputs.dtype == output.dtype and not torch.is_autocast_enabled(output.device.type):
            # Of flat tensors: few operators, which is what a call on a short text consists of.
            inner, flat = torch.mm(inputs.flatten(0, -2), down.t().to(inputs.dtype)), output.flatten(0, -2)
            up = up.t().to(inputs.dtype)
            if is_plain_linear(base) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return flat.addmm_(inner, up).view(output.shape)  # a plain map's output is nobody else's
            return torch.addmm(flat, inner, up).view(output.shape)
        return output + linear(linear(inputs, down.to(inputs.dtype)), up.to(inputs.dtype)).to(output.dtype)

    def current_update(self, inputs: Tensor) -> tuple[str, Tensor, Tensor] | None:
        """Name, A and B of the plugin that merges in the call under way; `None`: none does, or it has no update.

        Args:
            inputs: what the map gets, shape `(…, in_features)`.
        """
        call = None if self.stack is None else self.stack.current_groups()
        choice = None if call is None else call.choice_of(self.network_name, inputs)
        if choice is None or choice[0] not in getattr(self, self.adapter_layer_names[0]):
            return None
        return choice[0], *self.factors(choice[0])

    def _pays_to_sum(self, *tensors: Tensor) -> bool:
        """Whether W + B·A is less work than B·(A·x): where there are tokens enough and nothing trains.

        The sum is made anew in every call. Kept, it would be as large as W, and wrong after W was changed through
        `.data`, as PEFT does it when it merges: that leaves no trace in the weight's version.
        """
        inputs = tensors[0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        few = self.in_features * self.out_features // (self.in_features + self.out_features)
        if inputs.numel() // self.in_features <= few or torch.is_autocast_enabled(inputs.device.type):
            return False
        # In half precision the sum would round the update away.
        return all(tensor.dtype == torch.float32 for tensor in tensors)


def _forget_sums(module: nn.Module, _: object) -> None:
    """What is loaded is no longer what was summed and quantised."""
    assert isinstance(module, CompensatedLinear)  # which registers this
    module.quantized.clear()


def compensate(model: nn.Module, placements: list[Placement], config: VariatorConfig, adapter_name: str) -> None:
    """Put the updates of a plugin around the maps of the blocks that it is in.

    Args:
        model: the base model, with the plugin's layers in it.
        placements: where these are.
        config: the plugin's configuration; without a `compensation_rank` nothing is done.
        adapter_name: the plugin's name.

    Raises:
        ValueError: it is rounded, and the plugin is new.
    """
    if config.compensation_rank is None:
        return
    if config.compensation_bits is not None and not config.was_saved:
        raise ValueError(
            f"compensation_bits={config.compensation_bits}: rounded updates are not trained, so a new plugin has "
            "none. Leave it out, and call peft_variator.shrink_plugin(model, bits) once the plugin is trained."
        )
    done: set[int] = set()
    networks = [name for placement in placements if not placement.layers for name in placement.ends]
    for placement in placements:
        layer = model.get_submodule(placement.key)
        assert isinstance(layer, VariatorLayer)  # what has been put there
        for name in [*_maps_of_network(model, layer), *_maps_of_attention(model, placement, networks)]:
            module = model.get_submodule(name)
            if id(module) in done:
                continue
            if not isinstance(module, CompensatedLinear):
                module = CompensatedLinear(module, placement.key)
                model.set_submodule(name, module)
            done.add(id(module))
            module.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
            module.update_layer(adapter_name, config)
            if adapter_name not in layer.active_adapters:
                module.requires_grad_(False)


def _maps_of_network(model: nn.Module, layer: VariatorLayer) -> list[str]:
    """Names of the maps inside of a network; none where its inside is not known, as in a mixture of experts."""
    network = layer.network()
    if network is None:
        return []
    return [name for name, module in model.named_modules() if any(module is each for each in network.maps)]


def _maps_of_attention(model: nn.Module, placement: Placement, networks: list[str]) -> Iterator[str]:
    """Names of the maps of a network's block that are in no network with a plugin; of a span those of all layers."""
    block = block_of(placement.key)
    # The layers of a span are inside of the plugin's own modules.
    blocks = [f"{layer}.base_layer" for layer in placement.layers] or ([] if block is None else [block])
    inside: tuple[str, ...] = ()  # of maps, and of modules that read the weights of their parts
    for name, module in (each for block in blocks for each in model.get_submodule(block).named_modules(prefix=block)):
        if name.startswith(inside) or any(name == each or name.startswith(f"{each}.") for each in networks):
            continue
        if _reads_weights_of_maps(module):
            inside += (f"{name}.",)
        elif is_map(module):
            inside += (f"{name}.",)
            yield name


def _reads_weights_of_maps(module: nn.Module) -> bool:
    """Whether an attention takes the weights of its maps without calling them, as torch's own does, and WavLM's."""
    functions = [function for kind in type(module).__mro__ for function in vars(kind).values()]
    return isinstance(module, nn.MultiheadAttention) or any(
        "multi_head_attention_forward" in function.__code__.co_names
        for function in functions
        if inspect.isfunction(function)
    )
