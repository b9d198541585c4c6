"""What `layer.weight` is on a packed layer: the shape, dtype and device of a weight that is nowhere unpacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .layout import unpack


__all__ = ["PackedWeightHandle"]


class PackedWeightHandle(Tensor):
    """A read-only tensor of the dense shape that costs nothing until it is computed with.

    Models ask their layers for `weight.dtype`, `weight.device` or `weight.shape`, which must not unpack anything.
    Operations that read it work on a freshly unpacked copy. Operations that write raise, since what they write would
    be lost: an update of a packed weight has to keep its zeros.
    """

    # transformers draws every weight that has no such mark when it is done loading; see check_complete
    _is_hf_initialized = True

    _compressed: Tensor
    _bitmask: Tensor

    @staticmethod
    def __new__(cls, compressed: Tensor, bitmask: Tensor, in_features: int) -> PackedWeightHandle:
        handle = Tensor._make_wrapper_subclass(
            cls, (compressed.shape[0], in_features), dtype=compressed.dtype, device=compressed.device
        )
        handle._compressed, handle._bitmask = compressed, bitmask
        return handle

    def unpack(self) -> Tensor:
        """The dense weight, a new tensor (out_features, in_features)."""
        return unpack(self._compressed, self._bitmask, self.shape[1])

    @property
    def data(self) -> Tensor:
        """The handle itself: what is written to it raises."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _read_only("assignment to .data")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run `func` on the unpacked weight."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func._schema.is_mutable:
            raise _read_only(func.name())
        args, kwargs = tree_map_only(cls, lambda handle: handle.unpack(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _read_only(operation: str) -> NotImplementedError:
    return NotImplementedError(
        f"{operation} would write to the weight of a packed 2:4 layer, and the change would be lost. A plain low-rank "
        "update does not keep the zeros: train and merge with SparseLoRA, use layer.write(matrix) for a matrix with "
        "the same zeros, or make the layer dense first with layer.to_dense()."
    )
