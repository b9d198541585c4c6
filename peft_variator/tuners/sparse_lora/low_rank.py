"""The low-rank updates of one module: the parameters A and B of each adapter, and the base weight they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import SparseLoraConfig
from .layouts import WeightLayout, find_layout, get_layout
from .merging import sum_updates


__all__ = ["LowRankLayer"]


class LowRankLayer(nn.Module, BaseTunerLayer):
    """A base layer and the updates s·B·A of its adapters.

    Weights are matrices of shape (out_features, in_features) here, whatever shape the base layer keeps them in; for a
    convolution, in_features is in_channels / groups · kernel height · kernel width.

    Args:
        base_layer: the layer to adapt, or another tuner's layer around it.
        module_name: its name in the model, for messages.

    Raises:
        TypeError: the base layer has no floating point weight that can be adapted.
    """

    adapter_layer_names: tuple[str, ...] = ("sparse_low_rank_A", "sparse_low_rank_B")
    other_param_names: tuple[str, ...] = ("rank", "scaling", "recompute")

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        layout = find_layout(self.get_base_layer())
        if layout is None or not layout.tensors(self.get_base_layer())[0].is_floating_point():
            raise TypeError(
                f"SparseLoRA cannot adapt the module {module_name!r} of type {type(self.get_base_layer()).__name__}. "
                "It adapts nn.Linear, Conv1D and nn.Conv2d with floating point weights, and classes registered with "
                "`register_layout`; not quantized layers and not the out_proj of nn.MultiheadAttention, whose weight "
                "is read without calling it. Exclude it with `exclude_modules`."
            )
        self.layout_name = layout.name
        self.out_features, self.in_features = layout.shape(self._base_tensors())
        self.sparse_low_rank_A = nn.ParameterDict()  # (rank, in_features) each
        self.sparse_low_rank_B = nn.ParameterDict()  # (out_features, rank) each
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.recompute: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True

    @property
    def layout(self) -> WeightLayout:
        """How the base layer keeps its weight."""
        return get_layout(self.layout_name)

    def update_layer(self, adapter_name: str, config: SparseLoraConfig, rank: int, alpha: float) -> None:
        """Add an adapter of this rank to the layer, or replace it by a new one."""
        self.rank[adapter_name] = rank
        self.scaling[adapter_name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.recompute[adapter_name] = config.recompute
        self.sparse_low_rank_A[adapter_name] = nn.Parameter(torch.empty(rank, self.in_features))
        self.sparse_low_rank_B[adapter_name] = nn.Parameter(torch.zeros(self.out_features, rank))
        self._init_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _init_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.sparse_low_rank_A[adapter_name], std=1 / self.rank[adapter_name])
        else:
            nn.init.kaiming_uniform_(self.sparse_low_rank_A[adapter_name], a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(self.sparse_low_rank_B[adapter_name], a=math.sqrt(5))

    def _factors(self, adapter_names: Sequence[str]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """A, B and s of each of these adapters."""
        a = [self.sparse_low_rank_A[name] for name in adapter_names]
        b = [self.sparse_low_rank_B[name] for name in adapter_names]
        return a, b, [self.scaling[name] for name in adapter_names]

    def _update(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """Σ s·B·A, (out, in), in float32 or better."""
        return sum_updates(*self._factors(adapter_names), dtype=self._base_tensors()[0].dtype)

    def _base_tensors(self) -> list[torch.Tensor]:
        return self.layout.tensors(self.get_base_layer())

    def _onloaded(self) -> AbstractContextManager[Any]:
        """Brings in what accelerate has offloaded: its hooks sit on forwards that are not called here."""
        if not self._is_offloaded():
            return nullcontext()
        stack = ExitStack()
        for module in self._modules_with_weights():
            stack.enter_context(align_module_device(module))
        return stack

    def _is_offloaded(self) -> bool:
        modules = self._modules_with_weights()
        return any(parameter.is_meta for module in modules for parameter in module.parameters(recurse=False))

    def _modules_with_weights(self) -> tuple[nn.Module, ...]:
        return self.get_base_layer(), self.sparse_low_rank_A, self.sparse_low_rank_B

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        """PEFT looks for a `weight`, which packed layers don't have, and puts adapters of offloaded ones on meta."""
        with self._onloaded():
            tensor = self._base_tensors()[0]
            return tensor.device, tensor.dtype
