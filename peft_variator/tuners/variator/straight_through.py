"""Training through a quantised base: its linear maps give the gradient of their dequantised weights.

Neither torch's quantised Linear nor torchao's with int8 activations gives any, and what is below one would not be
trained, without a word. Rounding has no gradient of its own, so it is passed over (straight-through, Bengio et al.
2013, https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...compat import is_quantized_tensor
from .linear_maps import is_torch_quantized
from .network import weight_of


__all__ = ["StraightThroughForward", "pass_gradients", "unwrap_gradients"]


class _StraightThrough(torch.autograd.Function):
    """A quantised map whose gradient is that of its dequantised weight: rounding activations has none of its own."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, forward: StraightThroughForward) -> Tensor:
        ctx.module = forward.module
        return forward.run(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ weight_of(ctx.module).to(gradient.dtype), None


class StraightThroughForward:
    """Stands in for the `forward` of a quantised linear map, which would give no gradient; copies go with the module.

    Args:
        module: the map.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.wrapped: Callable[..., Any] | None = vars(module).get("forward")
        module.forward = self

    def run(self, inputs: Tensor) -> Tensor:
        """The map as it was."""
        output = type(self.module).forward(self.module, inputs) if self.wrapped is None else self.wrapped(inputs)
        assert isinstance(output, Tensor)  # what a linear map gives
        return output

    def __call__(self, inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not inputs.requires_grad:
            return self.run(inputs)
        output = _StraightThrough.apply(inputs, self)
        assert isinstance(output, Tensor)
        return output

    def unwrap(self) -> None:
        """Give the module its own `forward` back."""
        if vars(self.module).get("forward") is self:
            if self.wrapped is None:
                del self.module.forward
            else:
                self.module.forward = self.wrapped


def pass_gradients(model: nn.Module) -> None:
    """Have the quantised maps of a model give the gradient of their dequantised weights."""
    for module in model.modules():
        if _is_without_gradient(module) and not isinstance(vars(module).get("forward"), StraightThroughForward):
            StraightThroughForward(module)


def unwrap_gradients(model: nn.Module) -> None:
    """Give the quantised maps of a model their own `forward` back."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, StraightThroughForward):
            forward.unwrap()


def _is_without_gradient(module: nn.Module) -> bool:
    return is_torch_quantized(module) or (isinstance(module, nn.Linear) and is_quantized_tensor(module.weight))
