"""`Sparse24Linear`: a linear layer whose 2:4 weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..offloading import DISK_OFFLOAD_MESSAGE, has_lost_its_hook
from .bits import mask_width
from .handle import PackedWeightHandle
from .kernels import Accelerator, KernelChoice, build_sparse_weight, choose_kernel
from .layout import LayoutError, PackedWeight, check_packed, gather_kept, pack, unpack, unpack_mask
from .product import as_autocast, packed_linear


__all__ = ["Sparse24Linear", "Unpacked"]

Unpacked = Literal["forward", "always"]
"""When the dense weight exists: in every forward, in a buffer that all layers share, or always, for speed."""


class Sparse24Linear(nn.Linear):
    """y = x·Wᵀ + b with a 2:4 weight W that is kept packed, in 0.5625 of its bytes in 16 bits.

    Parameters, all frozen but the bias: `compressed` (out_features, in_features / 2), `bitmask` uint8 (out_features,
    ceil(in_features / 8)), `shape` int64 (2, 1), `bias` (out_features,); see `peft_variator.bases.layout`. They are
    parameters and not buffers, so that device maps and offloading take care of them.

    The output equals that of the dense layer bit for bit, except on sparse tensor cores, where it is within the
    rounding of the dtype. Gradients reach the input and the bias; the weight is unpacked again in the backward and
    nothing of its size is kept for it.

    Args:
        in_features: inputs, a multiple of four.
        out_features: outputs.
        bias: whether there is a bias.
        device: where to make the parameters.
        dtype: dtype of `compressed` and the bias.
        unpacked: `"forward"` unpacks in each forward, `"always"` keeps the dense weight from the first one on, unless
            the layer is offloaded.

    Raises:
        LayoutError: `in_features` is no multiple of four.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        unpacked: Unpacked = "forward",
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the dense weight
        if in_features == 0 or in_features % 4:
            raise LayoutError(f"in_features={in_features} does not fill groups of 4. Use nn.Linear for this layer.")
        self.in_features, self.out_features = in_features, out_features
        self.unpacked = unpacked
        self.offloaded = False
        self._dense: Tensor | None = None
        self._sparse: Tensor | None = None
        # A valid weight, all zeros, until one is loaded: the first two places of every group.
        bits = torch.full((out_features, mask_width(in_features)), 0x33, dtype=torch.uint8, device=device)
        if in_features % 8:
            bits[:, -1] = 0x03
        compressed = torch.zeros(out_features, in_features // 2, device=device, dtype=dtype)
        self.compressed = nn.Parameter(compressed, requires_grad=False)
        self.bitmask = nn.Parameter(bits, requires_grad=False)
        size = torch.tensor([[out_features], [in_features]], device=device)
        self.shape = nn.Parameter(size, requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_dense(cls, linear: nn.Linear, name: str = "weight", unpacked: Unpacked = "forward") -> Sparse24Linear:
        """Pack a dense layer, which has to be 2:4; the bias is shared with it.

        Raises:
            LayoutError: the weight is not 2:4; `name` is what the message calls it.
        """
        with torch.no_grad():
            packed = pack(linear.weight, name)
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", unpacked=unpacked)
        layer.compressed = nn.Parameter(packed.compressed, requires_grad=False)
        layer.bitmask = nn.Parameter(packed.bitmask, requires_grad=False)
        layer.shape = nn.Parameter(packed.shape, requires_grad=False)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weight, its zeros +0.0, and the same bias parameter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.unpack(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, a new tensor (out_features, in_features), cast to `dtype` where one is given."""
        return unpack(self.compressed.detach().to(dtype), self.bitmask, self.in_features)

    def mask(self) -> Tensor:
        """The kept places, bool (out_features, in_features)."""
        return unpack_mask(self.bitmask, self.in_features)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Replace the weight by a dense (out_features, in_features) whose zeros include those of this layer.

        Raises:
            LayoutError: `matrix` has another shape, or is not zero somewhere outside the kept places.
        """
        if matrix.shape != (self.out_features, self.in_features):
            raise LayoutError(
                f"The matrix has shape {tuple(matrix.shape)}, the layer {(self.out_features, self.in_features)}."
            )
        outside = matrix.masked_fill(self.mask(), 0).ne(0).any(dim=1)
        if outside.any():
            raise LayoutError(
                f"The matrix, row {int(outside.nonzero()[0])}: a weight outside the kept places is not zero, and "
                "would be lost. Mask the update with layer.mask()."
            )
        self.compressed.copy_(gather_kept(matrix.to(self.compressed.dtype), self.bitmask))
        self.forget()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Shape, dtype and device of the dense weight at no cost; reading its values unpacks it, writing raises."""
        if self.offloaded and has_lost_its_hook(self):
            raise ValueError(DISK_OFFLOAD_MESSAGE)  # for PEFT's own adapters, which look for it
        return PackedWeightHandle(self.compressed, self.bitmask, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.compressed.requires_grad:
            raise RuntimeError(
                "A packed 2:4 weight is frozen, but `compressed` requires a gradient. Call "
                "compressed.requires_grad_(False), and train an adapter, for example SparseLoRA."
            )
        if self.offloaded and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "This packed 2:4 layer is offloaded, and above offloaded layers nothing is trained: PEFT puts their "
                "adapters on the meta device, where they get no gradients, and autograd would keep every weight that "
                "is brought in until the backward. Load the model without offloading; for inference call model.eval()."
            )
        input, bias, dtype = as_autocast(input, self.bias, self.compressed.dtype)
        if input.is_cuda and self.kernel(dtype, input.device).kernel != "dense":
            return packed_linear(input, bias, self.compressed, self.bitmask, dtype, self._sparse_weight(dtype))
        if self.unpacked == "always" and not self.offloaded:
            return F.linear(input, self._dense_weight(dtype), bias)
        return packed_linear(input, bias, self.compressed, self.bitmask, dtype)

    def kernel(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> KernelChoice:
        """The product that this layer runs in `dtype` on `device` (its own by default), and why."""
        if self.offloaded:
            return KernelChoice("dense", "the layer is offloaded, and a copy of its weight would stay on the device")
        accelerator = Accelerator.of(device or self.compressed.device)
        return choose_kernel(self.out_features, self.in_features, dtype or self.compressed.dtype, accelerator)

    def forget(self) -> None:
        """Drop what was built from the packed weight; to call after changing the packed tensors by hand."""
        self._dense = self._sparse = None

    def reset_parameters(self) -> None:
        """A packed weight is loaded, never drawn."""
        raise NotImplementedError("A packed 2:4 layer has no random initialisation: load it, or pack a dense layer.")

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, unpacked={self.unpacked!r}"

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        if self._dense is None or self._dense.dtype != dtype:
            with torch.inference_mode(False):
                self._dense = self.unpack(dtype)
        return self._dense

    def _sparse_weight(self, dtype: torch.dtype) -> Tensor:
        if self._sparse is None or self._sparse.dtype != dtype:
            with torch.inference_mode(False):
                self._sparse = build_sparse_weight(self.unpack(dtype), self.kernel(dtype).kernel)
        return self._sparse

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.forget()
        names = [prefix + part for part in PackedWeight._fields]
        parts = [state_dict[name] for name in names if name in state_dict]
        # A subclass holds one process's share of a weight, which was checked before it was shared out.
        if len(parts) == len(names) and all(type(part) in (Tensor, nn.Parameter) for part in parts):
            check_packed(PackedWeight(*parts), prefix.rstrip("."))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # what was built is built again by the copy
        return {**self.__dict__, "_dense": None, "_sparse": None}
