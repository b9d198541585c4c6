"""`Sparse24Linear`: a linear layer whose 2:4 weight stays packed, its product, and how SparseLoRA reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..bitmask import mask_width, unpack_mask
from ..compat import make_wrapper_subclass, tree_map_only
from ..offloading import DISK_OFFLOAD_MESSAGE, has_lost_its_hook
from ..tuners.sparse_lora.base_weight import WORKSPACE, WeightLayout, register_layout
from ..weight_kernels.product import FewTokensWeight, describe_product, is_faster, multiply
from .kernels import Accelerator, KernelChoice, build_sparse_weight, choose_kernel
from .packing import LayoutError, PackedWeight, check_packed, gather_kept, pack, unpack


__all__ = ["PACKED_LAYOUT", "Sparse24Linear", "Unpacked", "describe_path", "describe_paths", "register_packed_layout"]


Unpacked = Literal["forward", "always"]
"""When the dense weight exists: in every forward, in a buffer that all layers share, or always, for speed."""


class Sparse24Linear(nn.Linear):
    """y = x·Wᵀ + b with a 2:4 weight W that is kept packed, in 0.5625 of its bytes in 16 bits.

    Parameters, all frozen but the bias: `compressed` (out_features, in_features / 2), `bitmask` uint8 (out_features,
    ceil(in_features / 8)), `shape` int64 (2, 1), `bias` (out_features,); see `peft_variator.bases.packing`. They are
    parameters and not buffers, so that device maps and offloading take care of them.

    The output equals that of the dense layer bit for bit, except on sparse tensor cores and for up to 16 tokens that
    the product of the packed form takes (`peft_variator.weight_kernels`), where it is within the rounding of the
    dtype. Gradients reach the input and the bias; the weight is unpacked again in the backward and nothing of its size
    is kept for it.

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
        if torch.jit.is_tracing():
            return packed_linear(input, bias, self.compressed, self.bitmask, dtype)
        if input.is_cuda and (kernel := self.kernel(dtype, input.device).kernel) != "dense":

            def by_tensor_cores() -> Tensor:
                return packed_linear(input, bias, self.compressed, self.bitmask, dtype, self._sparse_weight(dtype))

            # A token or a few are bound by reading the weight, where the packed form may win: it is measured.
            measured = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or dtype != self.compressed.dtype)
            packed = FewTokensWeight(self.compressed, self.bitmask)
            if measured and is_faster(input, bias, packed, by_tensor_cores, kernel):
                return multiply(input, bias, packed)
            return by_tensor_cores()
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


def describe_path(layer: Sparse24Linear, dtype: torch.dtype | None = None) -> str:
    """What the forward of a packed layer does and the reason, in one clause without a full stop.

    Args:
        layer: the layer.
        dtype: dtype of the product; that of the layer by default.
    """
    choice = layer.kernel(dtype)
    few = describe_product(
        layer.out_features, layer.in_features, dtype or layer.compressed.dtype, layer.compressed.device.type
    )
    if choice.kernel != "dense":
        path = f"sparse tensor cores ({choice.kernel}), because {choice.reason}"
        return path if few is None else f"{path}; {few}"
    if layer.unpacked == "always" and not layer.offloaded:
        return f"a dense weight that is unpacked once and kept, because unpacked='always', and {choice.reason}"
    path = f"unpack into a buffer, because {choice.reason}"
    return path if few is None else f"{path}; {few}"


def describe_paths(model: nn.Module) -> dict[str, str]:
    """`describe_path` of every packed layer of a model, by the layer's name; empty for a dense model."""
    modules = model.named_modules()
    return {name: describe_path(module) for name, module in modules if isinstance(module, Sparse24Linear)}


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
        handle = make_wrapper_subclass(cls, (compressed.shape[0], in_features), compressed)
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


def as_autocast(input: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """Input, bias and dtype of the product as autocast would have them for `F.linear`, which leaves float64 alone."""
    device_type = input.device.type
    if not torch.is_autocast_enabled(device_type):
        return input, bias, dtype
    target = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(target)

    return cast(input), None if bias is None else cast(bias), dtype if dtype == torch.float64 else target


def packed_linear(
    input: Tensor,
    bias: Tensor | None,
    compressed: Tensor,
    bitmask: Tensor,
    dtype: torch.dtype,
    sparse: Tensor | None = None,
) -> Tensor:
    """x·Wᵀ + b for a packed W.

    Args:
        input: (..., in_features), of `dtype`.
        bias: (out_features,), of `dtype`.
        compressed: (out_features, in_features / 2).
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        dtype: what W is cast to, before it is unpacked.
        sparse: W as a semi-structured tensor of `torch.sparse`; the forward uses it, the backward unpacks.

    Returns:
        (..., out_features).
    """
    if torch.jit.is_tracing():  # which records operators, and no function of ours
        return _forward_op(input, bias, compressed, bitmask, dtype)
    if sparse is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _PackedLinear.apply(input, bias, compressed, bitmask, dtype, sparse)
    return _forward(input, bias, compressed, bitmask, dtype)


def _unpacked(compressed: Tensor, bitmask: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """W (out_features, in_features) in the workspace."""
    compressed = compressed.to(dtype)
    return unpack(compressed, bitmask, in_features, out=WORKSPACE.take((compressed.shape[0], in_features), compressed))


def _forward(input: Tensor, bias: Tensor | None, compressed: Tensor, bitmask: Tensor, dtype: torch.dtype) -> Tensor:
    def unpacked() -> Tensor:
        return F.linear(input, _unpacked(compressed, bitmask, 2 * compressed.shape[1], dtype), bias)

    weight = FewTokensWeight(compressed, bitmask)
    if dtype == compressed.dtype and is_faster(input, bias, weight, unpacked):
        return multiply(input, bias, weight)
    return unpacked()


def _input_gradient(grad: Tensor, compressed: Tensor, bitmask: Tensor, dtype: torch.dtype) -> Tensor:
    """g·W, (..., out_features) -> (..., in_features)."""
    weight = _unpacked(compressed, bitmask, 2 * compressed.shape[1], dtype)
    return grad.reshape(-1, grad.shape[-1]).mm(weight).view(*grad.shape[:-1], weight.shape[1])


# Opaque to torch.compile and torch.jit.trace: traced through, a compiler's partitioner would see the same unpacked
# weight in forward and backward and keep it in between.
_forward_op = torch.library.custom_op("peft_variator::packed_linear", _forward, mutates_args=())
_input_gradient_op = torch.library.custom_op(
    "peft_variator::packed_linear_input_gradient", _input_gradient, mutates_args=()
)


@_forward_op.register_fake
def _(input, bias, compressed, bitmask, dtype):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], compressed.shape[0])


@_input_gradient_op.register_fake
def _(grad, compressed, bitmask, dtype):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], 2 * compressed.shape[1])


class _PackedLinear(torch.autograd.Function):
    """Keeps the packed tensors for the backward, which are kept anyway, and unpacks again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        compressed: Tensor,
        bitmask: Tensor,
        dtype: torch.dtype,
        sparse: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(compressed, bitmask)
        ctx.dtype = dtype
        if sparse is not None:
            return F.linear(input, sparse, bias)
        forward = _forward_op if torch.compiler.is_compiling() else _forward
        return forward(input, bias, compressed, bitmask, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient = _input_gradient_op if torch.compiler.is_compiling() else _input_gradient
        needs_input, needs_bias = ctx.needs_input_grad[:2]
        compressed, bitmask = ctx.saved_tensors
        grad_input = input_gradient(grad, compressed, bitmask, ctx.dtype) if needs_input else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0) if needs_bias else None
        return grad_input, grad_bias, None, None, None, None


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [layer.get_parameter("compressed"), layer.get_parameter("bitmask")]


def _in_features(tensors: list[Tensor]) -> int:
    return 2 * tensors[0].shape[1]


def _write(layer: nn.Module, matrix: Tensor) -> None:
    assert isinstance(layer, Sparse24Linear)  # what the layout is registered for
    layer.write(matrix)


PACKED_LAYOUT = WeightLayout(
    name="sparse24",
    tensors=_tensors,
    shape=lambda tensors: torch.Size((tensors[0].shape[0], _in_features(tensors))),
    weight=lambda tensors: unpack(tensors[0], tensors[1], _in_features(tensors)),
    # The kept places, straight from the bitmask: those whose weight happens to be 0 are free to be learned, too.
    kept=lambda tensors: unpack_mask(tensors[1], _in_features(tensors)),
    flatten=lambda weight: weight,
    write=_write,
    rows=lambda tensors, rows: [tensor[rows] for tensor in tensors],
    few_tokens=lambda tensors: FewTokensWeight(*tensors),
)
"""The accessors of `Sparse24Linear`."""


def register_packed_layout() -> None:
    """Let SparseLoRA wrap packed layers. Does nothing the second time."""
    register_layout(Sparse24Linear, PACKED_LAYOUT)
