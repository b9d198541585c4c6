"""Memory for what is as large as a weight and needed for the length of one product."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


__all__ = ["WORKSPACE", "Workspace"]


class Workspace(threading.local):
    """One buffer a thread, as large as the largest tensor that was taken so far.

    On CPUs a fresh tensor of this size costs page faults each time. GPUs have a caching allocator, which also knows
    about streams.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
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
