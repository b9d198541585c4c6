"""How each class of base layer keeps its weight: one entry a class, so that packed bases can add theirs.

Everything in `sparse_lora` sees a weight as a matrix of shape (out_features, in_features). A `WeightLayout` says how
to get that matrix, and the mask M of the weights that pruning kept, from the tensors that a base layer really holds.
Its functions take tensors and not the module, so that a backward can rebuild the weight from what autograd saved.
A whole weight that is needed for one product alone is made in the `WORKSPACE`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ...weight_kernels.product import FewTokensWeight


__all__ = [
    "WORKSPACE",
    "WeightLayout",
    "Workspace",
    "computed_weight_error",
    "find_layout",
    "get_layout",
    "has_computed_weight",
    "has_forward_of_its_own",
    "register_layout",
]


@dataclass(frozen=True)
class WeightLayout:
    """Accessors for the weight of one class of base layers.

    Args:
        name: unique name; compiled graphs refer to the layout by it.
        tensors: base layer -> the frozen tensors its weight is made of; the first has the weight's dtype and device.
        shape: these tensors -> (out_features, in_features).
        weight: these tensors -> the weight, (out_features, in_features); a view where possible.
        kept: these tensors -> the mask M, bool (out_features, in_features), True where the weight was not pruned.
        flatten: a tensor shaped like the layer's own weight -> (out_features, in_features).
        write: puts a matrix (out_features, in_features) into the base layer. Zeros of the matrix must stay zeros.
        rows: these tensors and a slice of rows -> the tensors that the weight of these rows is made of, so that a
            large weight need not be handled at once; `None` where that can't be told.
        few_tokens: these tensors -> the weight as the products of a few tokens read it; `None` where they can't.
    """

    name: str
    tensors: Callable[[nn.Module], list[torch.Tensor]]
    shape: Callable[[list[torch.Tensor]], torch.Size]
    weight: Callable[[list[torch.Tensor]], torch.Tensor]
    kept: Callable[[list[torch.Tensor]], torch.Tensor]
    flatten: Callable[[torch.Tensor], torch.Tensor]
    write: Callable[[nn.Module, torch.Tensor], None]
    rows: Callable[[list[torch.Tensor], slice], list[torch.Tensor]] | None = None
    few_tokens: Callable[[list[torch.Tensor]], FewTokensWeight] | None = None


_BY_CLASS: dict[type[nn.Module], WeightLayout] = {}
_BY_NAME: dict[str, WeightLayout] = {}


def register_layout(base_class: type[nn.Module], layout: WeightLayout) -> None:
    """Let SparseLoRA wrap `base_class` and its subclasses. The same entry may be registered again.

    Raises:
        ValueError: another layout has this name.
    """
    if _BY_NAME.get(layout.name, layout) != layout:
        raise ValueError(f"A weight layout named {layout.name!r} is already registered. Choose another name.")
    _BY_NAME[layout.name] = layout
    _BY_CLASS[base_class] = layout


def get_layout(name: str) -> WeightLayout:
    """The layout registered under `name`."""
    return _BY_NAME[name]


def find_layout(base_layer: nn.Module) -> WeightLayout | None:
    """The layout of the closest registered base class of `base_layer`, or None where its weight can't be adapted."""
    if isinstance(base_layer, NonDynamicallyQuantizableLinear):
        # the out_proj of nn.MultiheadAttention: its weight is read and its forward never called
        return None
    base_class = _registered_class(base_layer)
    return None if base_class is None or has_forward_of_its_own(base_layer) else _BY_CLASS[base_class]


def has_forward_of_its_own(base_layer: nn.Module) -> bool:
    """Whether a layer computes something else with its weight than the registered class that it derives from does.

    The routers of Llama 4 and Phi-3.5-MoE do. Falcon's maps are linear, and only round the product before the bias.
    """
    base_class = _registered_class(base_layer)
    is_other = base_class is not None and type(base_layer).forward is not base_class.forward
    return is_other and type(base_layer).__name__ != "FalconLinear"


def has_computed_weight(base_layer: nn.Module) -> bool:
    """Whether a dense layer makes its weight anew from others, so that what is written into it would be lost.

    Only before FSDP has it: the weights there are views of a flat one, and no parameters of the layer either.
    """
    is_dense = _registered_class(base_layer) in (nn.Linear, Conv1D, nn.Conv2d)
    return is_dense and "weight" not in base_layer._parameters and "weight" not in base_layer._buffers


def computed_weight_error(module_name: str, lost: str) -> ValueError:
    """What to raise for a module whose weight is computed, and `lost` with it."""
    return ValueError(
        f"The weight of {module_name!r} is computed from others, by a parametrization, weight_norm or "
        f"torch.nn.utils.prune, so {lost} would be lost. Make it a plain one first, with "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), remove_weight_norm(module) or "
        f"torch.nn.utils.prune.remove(module, 'weight'), or leave it out with exclude_modules=[{module_name!r}]."
    )


def _registered_class(base_layer: nn.Module) -> type[nn.Module] | None:
    return next((each for each in type(base_layer).__mro__ if each in _BY_CLASS), None)


def _dense_weight(base_layer: nn.Module) -> torch.Tensor:
    """The `weight` of a base layer. Not always a parameter: inside FSDP it is a view of a flat one."""
    weight = base_layer.weight
    assert isinstance(weight, torch.Tensor)  # what the classes of `_dense_layout` have
    return weight


def _dense_layout(
    name: str,
    flatten: Callable[[torch.Tensor], torch.Tensor],
    unflatten: Callable[[torch.Tensor, torch.Size], torch.Tensor],
    rows: Callable[[torch.Tensor, slice], torch.Tensor] = lambda weight, rows: weight[rows],
    few_tokens: Callable[[list[torch.Tensor]], FewTokensWeight] | None = None,
) -> WeightLayout:
    """Layout of a layer with one dense `weight`; `unflatten` gives a matrix the shape of that weight."""

    def write(base_layer: nn.Module, matrix: torch.Tensor) -> None:
        weight = _dense_weight(base_layer)
        with torch.no_grad():
            # in place: tied weights stay tied, and a backward that still needs the old weight raises
            weight.copy_(unflatten(matrix, weight.shape))

    return WeightLayout(
        name=name,
        tensors=lambda base_layer: [_dense_weight(base_layer)],
        shape=lambda tensors: flatten(tensors[0]).shape,
        weight=lambda tensors: flatten(tensors[0]),
        kept=lambda tensors: flatten(tensors[0]).ne(0),
        flatten=flatten,
        write=write,
        rows=lambda tensors, block: [rows(tensors[0], block)],
        few_tokens=few_tokens,
    )


register_layout(
    nn.Linear,
    _dense_layout(
        "linear",
        lambda weight: weight,
        lambda matrix, shape: matrix,
        few_tokens=lambda tensors: FewTokensWeight(tensors[0], None),
    ),
)
register_layout(
    Conv1D,
    _dense_layout(
        "conv1d", lambda weight: weight.t(), lambda matrix, shape: matrix.t(), lambda weight, rows: weight[:, rows]
    ),
)
register_layout(
    nn.Conv2d, _dense_layout("conv2d", lambda weight: weight.flatten(1), lambda matrix, shape: matrix.reshape(shape))
)


class Workspace(threading.local):
    """One buffer a thread, as large as the largest tensor that was taken so far.

    On CPUs a fresh tensor of this size costs page faults each time. GPUs have a caching allocator, which also knows
    about streams.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of this shape and the dtype and device of `like`, valid until the next call."""
        if like.device.type != "cpu" or torch.compiler.is_compiling():
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        if self._bytes.numel() < size:
            with torch.inference_mode(False):  # the buffer outlives the inference mode it may be made in
                self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(like.dtype).view(shape)


WORKSPACE = Workspace()
"""The one that all layers share."""
