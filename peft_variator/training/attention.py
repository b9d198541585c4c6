"""Attention whose gradient is not slow on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


__all__ = ["AttentionInFloat32"]

LONGEST = 256
"""Queries up to which torch's gradient in half precision takes a CPU longer than both casts and the one in float32."""


class AttentionInFloat32(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` of half-precision tensors on a CPU computes in float32.

    Of short sequences torch's CPU kernel takes up to six times as long for a gradient in bfloat16 as for one in
    float32, which is more than half of a training step of a small encoder. What it gives has the dtype of the query as
    before. Nothing else changes, and long sequences stay as they are.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention or not _is_slow(*args, **kwargs):
            return func(*args, **kwargs)
        dtype = (args[0] if args else kwargs["query"]).dtype
        with torch.autocast("cpu", enabled=False):
            wide = [_in_float32(each) for each in args]
            return func(*wide, **{name: _in_float32(each) for name, each in kwargs.items()}).to(dtype)


def _is_slow(query: Tensor, *_: Any, **__: Any) -> bool:
    return query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[-2] <= LONGEST


def _in_float32(value: Any) -> Any:
    """A tensor of numbers; anything else, a mask of flags for example, stays."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
