"""The linear maps that plugins are made of, and how they and those of the base run and train when they are quantised.

Neither torch's quantised Linear nor torchao's with int8 activations gives a gradient, and what is below one would not
be trained, without a word. Training through a quantised base takes the gradient of the dequantised weights: rounding
has none of its own, so it is passed over (straight-through, Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.ao.nn.quantized import Linear as TorchQuantizedLinear
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.nn.functional import linear

from ...compat import in_process_group, is_quantized_tensor, tensor_version
from .network import Stamp, are_same, stamp, weight_of


__all__ = [
    "FloatLinear",
    "RoundedFactor",
    "RoundedRows",
    "RowsOfBase",
    "SplitDynamicLinear",
    "StraightThroughForward",
    "SummedMap",
    "UpdatedRows",
    "apply_linear",
    "as_linear",
    "is_quantized_map",
    "is_torch_quantized",
    "pass_gradients",
    "unwrap_gradients",
]


# Numbers of a rounded difference that share a scale.
BLOCK = 64
# By how much of themselves fingerprints differ at least where the weights are another model's: of unrelated ones by
# about √2, and hardly by less than 1 however small those are. Weights rounded to four bits in blocks differ by about
# 0.1, to eight with one scale for a whole weight, as by torch's `quantize_dynamic`, by as much as 0.6 (those of
# all-mpnet-base-v2): a few large weights make the steps coarse.
OTHER_BASE = 0.9
# A feature stands out in a call if its largest number is so many times that of the one behind the most that may.
OUTLIER = 3.0
MOST_OUTLIERS = 8


class FloatLinear(nn.Module):
    """`nn.Linear` in all but its class, which quantisers look for: small maps that stay in floating point."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        like = nn.Linear(in_features, out_features, bias)
        self.in_features, self.out_features = in_features, out_features
        self.weight, self.bias = like.weight, like.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The map of `inputs`, shape `(…, in_features)`."""
        return linear(inputs, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RoundedFactor(nn.Module):
    """A or B of a low-rank update in 8 bits a number, with a scale for each of the r directions. Nothing trains it.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        is_up: whether it is B, shape `(out_features, r)`, with a direction a column; A, `(r, in_features)`, has rows.
    """

    numbers: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, *, is_up: bool) -> None:
        super().__init__()
        self.is_up = is_up
        self._decoded: tuple[Tensor, Tensor, list[int], Tensor] | None = None
        self.register_buffer("numbers", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros((1, in_features) if is_up else (out_features, 1)))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Keep a weight, shape `(out_features, in_features)`, rounded (absmax, in steps of one size)."""
        # Divided by is what a file holds of the scale, in half precision maybe.
        scales = (weight.float().abs().amax(int(not self.is_up), keepdim=True) / 127).half().float()
        numbers = (weight.float() / torch.where(scales > 0, scales, 1)).round()
        self.scales.copy_(scales)
        self.numbers.copy_(numbers.clamp(-127, 127))

    @property
    def weight(self) -> Tensor:
        """The numbers times their scales, made once for what is kept: a state may be loaded without a word to it."""
        if torch.compiler.is_compiling():
            return self.numbers.to(self.scales.dtype) * self.scales
        numbers, scales = self.numbers, self.scales
        versions = [tensor_version(numbers), tensor_version(scales)]
        known = self._decoded
        if known is None or known[0] is not numbers or known[1] is not scales or known[2] != versions:
            with torch.inference_mode(False):  # what trains later may need it, too
                self._decoded = known = numbers, scales, versions, numbers.to(scales.dtype) * scales
        return known[3]


class SummedMap(nn.Module):
    """A map whose weight is the sum of the base's and an update, and that may hold the sum quantised, too.

    Attributes:
        quantized: the quantised sums by a name, which run while nothing trains; they follow the module to its device,
            and are no part of it that is saved.
    """

    quantized: dict[str, nn.Module]

    def quantized_sum(self, name: str, up: Tensor) -> nn.Module | None:
        """The quantised sum where there is one that is up to date; what trains the update's B, `up`, forgets it."""
        quantized = self.quantized.get(name)
        if quantized is not None and torch.is_grad_enabled() and up.requires_grad:
            del self.quantized[name]  # it will be out of date
            return None
        return quantized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for module in self.quantized.values():  # `to` and the like
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)


class RowsOfBase(SummedMap):
    """The base model's weights of some neurons, W_S, and what is added to them, which alone is saved."""

    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """The sum, shape `(out_features, in_features)`."""
        raise NotImplementedError

    def set_rows(self, rows: Tensor) -> None:
        """Take W_S anew; a quantised sum with the old one is forgotten."""
        raise NotImplementedError

    def quantized_map(self) -> nn.Module | None:
        """The sum as a quantised map, where there is one that is up to date."""
        raise NotImplementedError


class UpdatedRows(RowsOfBase):
    """The base model's weights of some neurons with an update, W_S + B·A, which alone is trained and saved.

    Where nothing trains, the sum is kept from call to call: making it takes about as long as a few dozen tokens.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: r of B `(out_features, r)` and A `(r, in_features)`.
        bias: whether there is a bias, which is trained whole.
    """

    rows: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(out_features, in_features), persistent=False)
        self.A = nn.Parameter(nn.Linear(in_features, rank).weight.detach())
        self.B = nn.Parameter(nn.Linear(rank, out_features).weight.detach())
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.quantized = {}
        self._summed: tuple[list[Stamp], Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        if not self._may_keep_sum():
            self._summed = None
            return self._sum()
        stamps = [stamp(tensor) for tensor in (self.rows, self.A, self.B)]
        known = self._summed
        if known is None or not are_same(known[0], stamps):
            with torch.inference_mode(False), torch.no_grad():  # calls outside of inference mode need it, too
                self._summed = known = stamps, self._sum()
        return known[1]

    def _sum(self) -> Tensor:
        return torch.addmm(self.rows.to(self.B.dtype), self.B, self.A)

    def _may_keep_sum(self) -> bool:
        """Whether nothing trains, and what is written to the weights leaves a trace.

        Not in code that is compiled, nor under autocast, which gives a sum of another dtype, nor in processes of a
        group, where FSDP puts weights together for every call.
        """
        if torch.compiler.is_compiling() or in_process_group() or torch.is_autocast_enabled(self.B.device.type):
            return False
        trains = torch.is_grad_enabled() and (self.A.requires_grad or self.B.requires_grad)
        return not trains and not self.A.is_inference() and not self.B.is_inference()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_summed": None}  # known by weak references, which no pickle takes

    def train(self, mode: bool = True) -> UpdatedRows:
        """As of `nn.Module`; a sum that was kept is made anew, as averages of weights are written through `.data`."""
        if mode != self.training:
            self._summed = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._summed = None  # `to` and the like give parameters other numbers without a trace
        return super()._apply(fn, recurse)

    def quantized_map(self) -> nn.Module | None:
        return self.quantized_sum("rows", self.B)

    def set_rows(self, rows: Tensor) -> None:
        if not same_numbers(self.rows, rows):
            self.rows = rows.to(self.B.device).clone()
            self.quantized.clear()


class RoundedRows(RowsOfBase):
    """Copies of some of the base model's neurons, kept as W_S and a rounded difference from it.

    The difference is cut into blocks of 64 numbers in the order of the rows, and a block is whole numbers of `bits`
    bits times one scale (absmax rounding by blocks, as in Dettmers et al. 2022, https://arxiv.org/abs/2110.02861,
    section 2.1, with steps of one size). Two numbers of four bits share a byte, the first one in its lower half.
    The sum runs as it is: a call costs what a plain map costs. It is not trained; the bias may be.

    Sums of W_S with signs are kept, too: by them `fits` tells whether the rows that were read last are about those
    that the difference was taken from, as those of a quantised base are.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bits: 4 or 8.
        bias: whether there is a bias.
    """

    difference: Tensor
    scales: Tensor
    fingerprint: Tensor
    summed: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool) -> None:
        super().__init__()
        self.bits = bits
        blocks = -(-in_features * out_features // BLOCK)
        self.register_buffer("difference", torch.zeros(blocks, BLOCK * bits // 8, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(blocks))
        self.register_buffer("fingerprint", torch.zeros(BLOCK))
        self.register_buffer("summed", torch.zeros(out_features, in_features), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.quantized = {}
        self.fits = True

    @property
    def weight(self) -> Tensor:
        return self.summed

    def quantized_map(self) -> nn.Module | None:
        bias = self.bias
        return self.quantized.get("rows") if bias is None else self.quantized_sum("rows", bias)

    def set_rows(self, rows: Tensor) -> None:
        kept = self.fingerprint.float().cpu()
        self.fits = bool((_fingerprint(rows) - kept).norm() <= OTHER_BASE * kept.norm())
        rows = rows.to(self.scales.device, self.summed.dtype)
        summed = rows + self._decoded()[: rows.numel()].view_as(rows).to(rows.dtype)
        if not same_numbers(self.summed, summed):
            self.summed = summed
            self.quantized.clear()

    @torch.no_grad()
    def set_weight(self, weight: Tensor, rows: Tensor) -> None:
        """Keep a weight as its rounded difference from W_S, both of shape `(out_features, in_features)`."""
        difference = (weight.float() - rows.to(weight.device).float()).flatten()
        blocks = _in_blocks(difference)
        half = 2 ** (self.bits - 1)
        # Divided by is what a file holds of the scale, in half precision maybe. The largest number lies half a step
        # beyond the last one up, since there is one less above zero than below.
        self.scales.copy_((blocks.abs().amax(1) / (half - 0.5)).half())
        scales = self.scales.float()
        numbers = (blocks / torch.where(scales > 0, scales, 1).unsqueeze(1)).round()
        codes = (numbers.clamp(-half, half - 1) + half).to(torch.uint8)
        self.difference.copy_(codes if self.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4)
        self.fingerprint.copy_(_fingerprint(rows))
        self.set_rows(rows)

    def _decoded(self) -> Tensor:
        """The difference, flat, with what fills up the last block."""
        codes = self.difference
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        return ((codes.float() - 2 ** (self.bits - 1)) * self.scales.float().unsqueeze(1)).flatten()


def _in_blocks(numbers: Tensor) -> Tensor:
    """Numbers in their order, shape `(blocks, 64)`; what is missing from the last block is 0."""
    flat = numbers.flatten()
    return nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _fingerprint(rows: Tensor) -> Tensor:
    """Sums over the blocks of some weights, each with a sign drawn once and for all; shape `(64,)`, on the CPU."""
    blocks = _in_blocks(rows.detach().float().cpu())
    signs = torch.randint(2, (len(blocks), 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (blocks * signs).sum(0)


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are alike, and on one device: what was made of one need not be made anew."""
    return one.device == other.device and one.dtype == other.dtype and not one.is_meta and torch.equal(one, other)


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain map with copies of a weight, shape `(out_features, in_features)`, and a bias; nothing trains it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def is_torch_quantized(module: object) -> TypeGuard[TorchQuantizedLinear]:
    """Whether a module is a Linear of torch's own quantisation."""
    return isinstance(module, TorchQuantizedLinear)


def is_quantized_map(module: Any) -> bool:
    """Whether a linear map is quantised, by torch, torchao or bitsandbytes."""
    if is_torch_quantized(module):
        return True
    if isinstance(module, FloatLinear | RowsOfBase | BaseTunerLayer):
        return False  # of an adapter around a map `weight` is the map's, which is not all that it computes
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) is nn.Parameter:
        return False
    return is_quantized_tensor(weight) or hasattr(weight, "quant_state")


def apply_linear(module: nn.Module, inputs: Tensor) -> Tensor:
    """A linear map in the dtype of its input: the small plugin follows the activations."""
    if isinstance(module, RowsOfBase):
        module = module.quantized_map() or module
    if isinstance(module, DynamicLinear):
        output = module(inputs.float())  # it takes nothing else
        assert isinstance(output, Tensor)  # what it gives
        return output.to(inputs.dtype)
    if is_quantized_map(module):
        output = module(inputs)
        assert isinstance(output, Tensor)  # what it gives
        return output.to(inputs.dtype)
    assert isinstance(module, nn.Linear | FloatLinear | RowsOfBase)  # what plugins are made of
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return linear(inputs, module.weight.to(inputs.dtype), bias)


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


class SplitDynamicLinear(DynamicLinear):
    """torch's int8 map, for inputs some of whose features may be far larger than all others.

    What comes in is rounded in steps of one size, and one such feature makes them so coarse that little is left of the
    others. Those that stand out in a call run beside it in floating point, as in LLM.int8() (Dettmers et al. 2022,
    https://arxiv.org/abs/2208.07339, section 3.2), though by what the largest of a feature is beside those of others.

    Attributes:
        columns: the weight in floating point, shape `(out_features, in_features)`.
    """

    columns: Tensor

    @classmethod
    def of(cls, quantized: DynamicLinear, weight: Tensor) -> SplitDynamicLinear:
        """The map that rounds as `quantized` does, whose weight was `weight`; it is kept, not copied."""
        split = cls(quantized.in_features, quantized.out_features, dtype=torch.qint8)
        split.set_weight_bias(quantized.weight(), quantized.bias())
        split.columns = weight.detach()
        return split.train(quantized.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """The map of `inputs`, float32 of shape `(…, in_features)`."""
        index = _outliers(inputs)
        if index is None:
            return super().forward(inputs)
        alone = linear(inputs.index_select(-1, index), self.columns.index_select(1, index).to(inputs.dtype))
        return super().forward(inputs.index_fill(-1, index, 0)) + alone


def _outliers(inputs: Tensor) -> Tensor | None:
    """Numbers of the features that stand out, shape `(count,)`, at most `MOST_OUTLIERS`; `None`: none does."""
    if inputs.numel() == 0 or inputs.shape[-1] <= MOST_OUTLIERS or torch.compiler.is_compiling():
        return None
    low, high = inputs.detach().flatten(0, -2).aminmax(dim=0)
    largest, index = torch.maximum(high, -low).topk(MOST_OUTLIERS + 1)
    count = int((largest > OUTLIER * largest[-1]).sum())
    return index[:count] if count else None


class StraightThroughForward:
    """Stands in for the `forward` of a quantised linear map, which has no gradient; copies go with the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.wrapped: Callable[..., Any] | None = vars(module).get("forward")
        module.forward = self

    def run(self, inputs: Tensor) -> Tensor:
        """The map as it was; torch's dynamic int8 takes float32 alone, and autocast gives half precision."""
        inputs = inputs.float() if isinstance(self.module, DynamicLinear) else inputs
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
