"""Whether kernels in Triton run on a device, and why not: for plugins and packed bases alike.

Triton is imported when a kernel is about to run on a GPU, and never else. Under `TRITON_INTERPRET=1` Triton's
interpreter runs kernels on tensors in memory, slowly, which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .compat import are_operators_watched


__all__ = ["SWITCH", "TritonState", "is_interpreted", "runs_triton", "triton_state"]

SWITCH = "PEFT_VARIATOR_TRITON"
"""Environment variable: 0 leaves the kernels off, and the plain functions run."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonState(NamedTuple):
    """Whether kernels run on a kind of device and, in one clause, why or why not."""

    runs: bool
    reason: str


def is_interpreted() -> bool:
    """Whether Triton's interpreter takes the place of its compiler."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=16)
def triton_state(device_type: str) -> TritonState:
    """Whether kernels run on devices of a type, found out once; imports Triton where there is a device for it.

    Args:
        device_type: as in `torch.device.type`; GPUs under ROCm are "cuda", too.
    """
    if os.environ.get(SWITCH) == "0":
        return TritonState(False, f"{SWITCH}=0 leaves them off")
    if device_type != "cuda" and not (device_type == "cpu" and is_interpreted()):
        return TritonState(False, f"Triton's kernels are for CUDA and ROCm, not {device_type}")
    if find_spec("triton") is None:
        return TritonState(False, "Triton is not installed")
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # whatever a broken installation raises
        return TritonState(False, f"Triton can't be imported: {error!r}")
    return TritonState(True, f"Triton {triton.__version__}{' in its interpreter' if is_interpreted() else ''}")


@torch.compiler.assume_constant_result
def _is_ready(device_type: str) -> bool:
    return triton_state(device_type).runs


def runs_triton(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors in this call: on a GPU, plain, of one dtype that they know, and not where
    others have to see the operators (programs that are exported, FLOP counters, function transforms).

    Args:
        tensors: what the kernel reads as floating point.
    """
    first = tensors[0]
    if first.device.type == "cpu" and not is_interpreted():
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return False
    elif torch.jit.is_tracing() or are_operators_watched():
        return False
    return _is_ready(first.device.type) and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device == first.device
        and tensor.dtype == first.dtype
        and tensor.dtype in _DTYPES
        for tensor in tensors
    )
