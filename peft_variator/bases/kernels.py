"""Which product a packed layer runs: a dense one on the unpacked weight, or one on sparse tensor cores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


__all__ = ["Accelerator", "Kernel", "KernelChoice", "build_sparse_weight", "choose_kernel"]

Kernel = Literal["dense", "cusparselt", "cutlass"]
"""`dense` unpacks; the others are the two backends of `torch.sparse.SparseSemiStructuredTensor`."""

_SPARSE_DTYPES = (torch.bfloat16, torch.float16)
# What out_features and in_features have to be multiples of (torch.sparse.semi_structured, 16-bit dtypes).
_MULTIPLES: dict[Kernel, tuple[int, int]] = {"cusparselt": (16, 16), "cutlass": (32, 64)}


@dataclass(frozen=True)
class Accelerator:
    """What matters of a device here.

    Args:
        type: its `torch.device.type`.
        capability: CUDA compute capability, (0, 0) for anything that is not an NVIDIA GPU.
        cusparselt: whether this PyTorch has cuSPARSELt.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    cusparselt: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Accelerator:
        """Look at a device of this machine."""
        if device.type != "cuda" or torch.version.hip is not None:
            return cls(device.type)
        return cls("cuda", torch.cuda.get_device_capability(device), torch.backends.cusparselt.is_available())


@dataclass(frozen=True)
class KernelChoice:
    """The product that a layer runs and, in one sentence, why."""

    kernel: Kernel
    reason: str


def choose_kernel(out_features: int, in_features: int, dtype: torch.dtype, accelerator: Accelerator) -> KernelChoice:
    """Choose by dtype, shape and device alone, so that it can be asked for a device that is not there.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: dtype that the product is computed in.
        accelerator: where it is computed.
    """
    if accelerator.type != "cuda" or accelerator.capability < (8, 0):
        device = accelerator.type
        if device == "cuda":
            device += f" with compute capability {accelerator.capability[0]}.{accelerator.capability[1]}"
        return KernelChoice("dense", f"sparse tensor cores need an NVIDIA GPU of capability 8.0 or more, not {device}")
    if dtype not in _SPARSE_DTYPES:
        return KernelChoice("dense", f"sparse tensor cores compute in bfloat16 or float16, not {_name(dtype)}")
    if not accelerator.cusparselt and accelerator.capability[0] != 8:
        return KernelChoice(
            "dense", "this PyTorch has no cuSPARSELt, and the CUTLASS kernels are for compute capability 8.x alone"
        )
    backend: Kernel = "cusparselt" if accelerator.cusparselt else "cutlass"
    rows, columns = _MULTIPLES[backend]
    if out_features % rows or in_features % columns or not out_features:
        return KernelChoice(
            "dense", f"{out_features}×{in_features} is no multiple of {rows}×{columns}, which {backend} needs"
        )
    return KernelChoice(backend, f"{_name(dtype)} {out_features}×{in_features} qualifies for {backend}")


def build_sparse_weight(weight: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Turn a dense 2:4 CUDA weight (out_features, in_features) into the tensor subclass of `torch.sparse`.

    Plain tensors stay what is stored and moved: safetensors can't write the subclass, and it has no input gradient.
    """
    subclass = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }[kernel]
    return subclass.from_dense(weight)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
