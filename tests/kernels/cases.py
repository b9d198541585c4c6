"""Triton's kernels against the plain functions: run by `test_kernels`, in the interpreter, or on a GPU.

A process of its own, as Triton looks for its interpreter when it is imported, which another test may have done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_variator.bases.packing import PackedWeight, pack, unpack
from peft_variator.bitmask import pack_mask
from peft_variator.triton_support import is_interpreted, triton_state
from peft_variator.tuners.variator import decompression, scoring
from peft_variator.tuners.variator.decompression import BottleneckDecompression, NeuronsDecompression
from peft_variator.tuners.variator.fused import expand_rows, merge_rows
from peft_variator.tuners.variator.linear_maps import FloatLinear
from peft_variator.tuners.variator.merging import Block, BoundedGroups, Groups, PackedGroups, SharedGroups
from peft_variator.tuners.variator.neurons import NeuronIndex
from peft_variator.tuners.variator.scoring import TokenScoring
from tests.bases.reference import two_four


DEVICE = torch.device("cpu" if is_interpreted() else "cuda")


def slow(*values: Any) -> list[Any]:
    """Values that `make test-all` tries: the interpreter takes long."""
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


def shared() -> SharedGroups:
    """Two sequences alike: a token by itself, groups of 4, of 3, and windows of 2×2."""
    blocks = [Block(0, (1, 1)), Block(1, (2, 4)), Block(9, (1, 3)), Block(12, (1, 2, 2, 2))]
    return SharedGroups.of(blocks, 2, DEVICE)


def packed() -> PackedGroups:
    """Ragged: tokens 0 and 7 by themselves, groups of 4, 3 and 2 tokens, padding at 11 to 19."""
    member_of = torch.tensor([[1, 2, 3, 4], [5, 6, 8, 5], [9, 10, 9, 9]], device=DEVICE)
    is_member = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], device=DEVICE).bool()
    row_of = torch.tensor([3, 0, 0, 0, 0, 1, 1, 4, 1, 2, 2] + [5] * 9, device=DEVICE)
    is_merged = (row_of < 3).unsqueeze(1)
    return PackedGroups(5, row_of, is_merged, False, member_of, is_member, torch.tensor([0, 7], device=DEVICE))


def bounded() -> BoundedGroups:
    """Two sequences with padding, kept tokens, and rows that are empty."""
    row = torch.tensor([[0, 1, 1, 1, 2, 3, 3, -1, -1, -1], [-1, -1, 0, 1, 1, 2, 2, 2, 3, 4]], device=DEVICE)
    slot = torch.tensor([[0, 0, 1, 2, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1, 2, 0, 0]], device=DEVICE)
    return BoundedGroups.of(row.clamp(min=-1), slot, row >= 0, 6, 3)


def alone() -> PackedGroups:
    """One group, one token, no padding: the smallest."""
    return PackedGroups(
        num_rows=1,
        row_of=torch.zeros(2, dtype=torch.long, device=DEVICE),
        is_merged=torch.ones(2, 1, dtype=torch.bool, device=DEVICE),
        all_real=True,
        member_of=torch.tensor([[0, 1]], device=DEVICE),
        is_member=torch.ones(1, 2, dtype=torch.bool, device=DEVICE),
        singles=torch.zeros(0, dtype=torch.long, device=DEVICE),
    )


def shape(groups: Groups) -> tuple[int, int]:
    return (2, groups.row_of.shape[0] // 2) if isinstance(groups, SharedGroups) else (1, groups.row_of.shape[0])


def reached(groups: Groups) -> Tensor:
    """Which rows some token has; what the others hold is nobody's business."""
    rows = torch.zeros(groups.num_rows + 1, dtype=torch.bool, device=DEVICE)
    return rows.index_fill(0, groups.row_of, True)[:-1]


def agree(found: list[Tensor], plain: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype) -> None:
    """What kernels gave lies within the rounding of its dtype of what the plain functions give in float64."""
    exact = plain(torch.float64)
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == dtype
        scale = 1 + float(other.abs().max()) if other.numel() else 1.0
        assert (one.double() - other).abs().le(8 * torch.finfo(dtype).eps * scale).all()


# The interpreter takes a tenth of a second for a program: each value stands somewhere, not all with all.
@pytest.mark.parametrize(
    ("make", "dtype", "dim"),
    [
        *slow((shared, torch.bfloat16, 37), (packed, torch.float32, 1100), (bounded, torch.bfloat16, 20)),
        (packed, torch.float16, 20),
        (alone, torch.float32, 1),
    ],
)
def test_merge(make: Callable[[], Groups], dtype: torch.dtype, dim: int) -> None:
    groups = make()
    batch, length = shape(groups)
    tokens, weight = torch.randn(batch, length, dim).to(DEVICE, dtype), torch.randn(1, dim).to(DEVICE, dtype)
    upstream = torch.randn(groups.num_rows, dim).to(DEVICE, dtype) * reached(groups).unsqueeze(1)

    def run(merge: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [tokens.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        rows = merge(*inputs)
        gradients = torch.autograd.grad(rows.flatten(0, 1), inputs, upstream.to(dtype))
        return [rows.flatten(0, 1)[reached(groups)].detach(), *gradients]

    def plain(tokens: Tensor, weight: Tensor) -> Tensor:
        scores = tokens @ weight.t()
        return groups.merge(tokens, lambda part: part.scores(scores))

    def in_double(dtype: torch.dtype) -> list[Tensor]:
        return run(plain, dtype)

    def kernel(tokens: Tensor, weight: Tensor) -> Tensor:
        rows = merge_rows(tokens, weight, groups)
        assert rows.shape == plain(tokens, weight).shape
        return rows

    # Layouts weight in float32 at most, whatever they are given.
    agree(run(kernel, dtype), in_double, dtype)


@pytest.mark.parametrize("make", slow((packed,), (bounded,)), ids=lambda make: make.__name__)
def test_tokens_by_themselves_are_copied_whatever_they_hold(make: Callable[[], Groups]) -> None:
    groups = make()
    batch, length = shape(groups)
    tokens = torch.randn(batch, length, 8, device=DEVICE)
    single = int((~groups.is_merged.flatten() & (groups.row_of < groups.num_rows)).nonzero()[0])
    tokens.flatten(0, 1)[single] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1, 2, 3, 4, 5])
    rows = merge_rows(tokens, torch.randn(1, 8, device=DEVICE), groups).flatten(0, 1)
    torch.testing.assert_close(
        rows[groups.row_of[single]], tokens.flatten(0, 1)[single], rtol=0, atol=0, equal_nan=True
    )
    kept = torch.arange(groups.num_rows, device=DEVICE) != groups.row_of[single]
    assert rows[kept & reached(groups)].isfinite().all()


@pytest.mark.parametrize(
    ("make", "dtype", "prologue"),
    [
        *slow((shared, torch.float32, "difference"), (shared, torch.bfloat16, "tanh")),
        (packed, torch.bfloat16, "difference"),
        (bounded, torch.float16, "tanh"),
        (alone, torch.bfloat16, "plain"),
    ],
)
def test_expand(make: Callable[[], Groups], dtype: torch.dtype, prologue: str) -> None:
    groups = make()
    dim, width = 70, 37
    sizes = [(groups.num_rows, dim), (groups.row_of.shape[0], width), (groups.num_rows, width), (dim, width), (dim,)]
    tensors = [(torch.randn(size) / 3).to(DEVICE, dtype) for size in sizes]
    unmerged = (~groups.is_merged).nonzero()[:1, 0]
    upstream = torch.randn(groups.row_of.shape[0], dim).to(DEVICE, dtype)
    used = [True, True, prologue != "plain", True, prologue == "tanh"]

    def run(expand: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [
            tensor.to(dtype).requires_grad_() if use else None for tensor, use in zip(tensors, used, strict=True)
        ]
        output = expand(*inputs)
        gradients = torch.autograd.grad(output, [each for each in inputs if each is not None], upstream.to(dtype))
        return [output.detach(), *gradients]

    def plain(rows: Tensor, inner: Tensor, of_rows: Tensor | None, up: Tensor, bias: Tensor | None) -> Tensor:
        if prologue != "plain":
            other = groups.spread(of_rows)
            inner = inner - other if prologue == "difference" else (inner + other).tanh()
        correction = inner @ up.t()
        correction = correction if bias is None else correction + bias
        return groups.spread(rows) + torch.where(groups.is_merged, correction, 0)

    def kernel(rows: Tensor, inner: Tensor, *others: Tensor | None) -> Tensor:
        clean = expand_rows(rows, inner, *others, groups, prologue)
        broken = inner.detach().index_fill(0, unmerged, torch.nan)  # of a token without a correction
        assert torch.equal(expand_rows(rows, broken, *others, groups, prologue), clean)
        return clean

    agree(run(kernel, dtype), lambda dtype: run(plain, dtype), dtype)


def test_near_zero_tanh_keeps_its_digits() -> None:
    groups = alone()
    values = torch.logspace(-6, 1, 64, device=DEVICE)
    inner = torch.stack([values, -values])
    nothing = torch.zeros(1, 64, device=DEVICE)
    found = expand_rows(nothing, inner, nothing, torch.eye(64, device=DEVICE), None, groups, "tanh")
    torch.testing.assert_close(found.double(), inner.double().tanh(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "form"), [(packed, "added"), *slow((shared, "added"), (packed, "sliced"), (bounded, "bottleneck"))]
)
def test_a_plugin_takes_them_and_gives_what_it_gives_without(
    make: Callable[[], Groups], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, dim, width = make(), 24, 20
    torch.manual_seed(0)
    scorer = FloatLinear(dim, 1, bias=False).to(DEVICE)
    parts: dict[str, nn.Module]
    if form == "bottleneck":
        decompress: decompression.Decompression = BottleneckDecompression()
        parts = {"variator_down_input": nn.Linear(dim, width, bias=False), "variator_up": nn.Linear(width, dim)}
        parts["variator_down_output"] = nn.Linear(dim, width)
    else:
        decompress = NeuronsDecompression()
        neurons = NeuronIndex(torch.arange(width), nn.functional.gelu, form == "sliced")
        parts = {"variator_neurons": neurons, "variator_neuron_into": nn.Linear(dim, width)}
        parts["variator_neuron_out"] = nn.Linear(width, dim, bias=False)
    weights = [*scorer.parameters(), *(each for part in parts.values() for each in part.to(DEVICE).parameters())]
    tokens = torch.randn(*shape(groups), dim, device=DEVICE, requires_grad=True)
    calls = []

    def plugin() -> list[Tensor]:
        rows = TokenScoring().merge(scorer, tokens, groups)
        output = decompress.expand(rows.sin(), rows, tokens, groups, parts)
        return [output, *torch.autograd.grad(output.square().sum(), [tokens, *weights])]

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            calls.append(function.__name__)
            return function(*args)

        return call

    monkeypatch.setattr(scoring, "merge_rows", counted(merge_rows))
    monkeypatch.setattr(decompression, "expand_rows", counted(expand_rows))
    found = plugin()
    assert calls == ["merge_rows", "expand_rows"]
    monkeypatch.setattr(scoring, "runs_triton", lambda *tensors: False)
    monkeypatch.setattr(decompression, "runs_fused", lambda *tensors: False)
    for one, other in zip(found, plugin(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    groups = packed()
    scorer, tokens = FloatLinear(8, 1, bias=False).to(DEVICE), torch.randn(1, 20, 8, device=DEVICE)

    def call(tokens: Tensor) -> Tensor:
        rows = TokenScoring().merge(scorer, tokens, groups).flatten(0, 1)
        return expand_rows(
            rows, tokens.flatten(0, 1), rows.cos(), torch.eye(8, device=DEVICE), None, groups, "difference"
        )

    results = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        inputs = tokens.clone().requires_grad_()
        output = run(inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), [inputs, scorer.weight])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_runs_is_told() -> None:
    assert triton_state(DEVICE.type).runs
    assert "Triton" in triton_state(DEVICE.type).reason
    assert not triton_state("mps").runs


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "dtype", "biased"),
    [
        (37, 132, 1, torch.float16, True),
        (33, 260, 5, torch.bfloat16, True),
        *slow((3, 4, 1, torch.bfloat16, False), (70, 136, 16, torch.float32, False), (5, 12, 17, torch.float16, True)),
    ],
)
def test_packed_product(rows: int, columns: int, tokens: int, dtype: torch.dtype, biased: bool) -> None:
    from peft_variator.weight_kernels.triton_kernel import multiply_triton  # Triton is there, or nothing of this runs

    packed = PackedWeight(*(part.to(DEVICE) for part in pack(two_four(rows, columns, dtype))))
    x, bias = torch.randn(tokens, columns).to(DEVICE, dtype), torch.randn(rows).to(DEVICE, dtype) if biased else None
    found = multiply_triton(x, bias, packed.compressed, packed.bitmask)
    weight = unpack(packed.compressed, packed.bitmask, columns).double()
    agree([found], lambda wide: [linear(x.to(wide), weight, None if bias is None else bias.to(wide))], dtype)


@pytest.mark.parametrize(
    ("form", "tokens", "rank", "dtype"),
    [
        ("packed", 1, 5, torch.bfloat16),
        ("dense", 3, 70, torch.float32),
        *slow(("packed", 16, 8, torch.float16), ("dense", 1, 1, torch.bfloat16), ("masked", 2, 3, torch.float32)),
        *slow(("packed and masked", 1, 2, torch.float32)),
    ],
)
def test_masked_product(form: str, tokens: int, rank: int, dtype: torch.dtype) -> None:
    from peft_variator.weight_kernels.triton_kernel import multiply_triton  # as above

    rows, columns = 37, 140
    dense = two_four(rows, columns, dtype)
    packed, kept = pack(dense), dense != 0
    masked = (torch.rand(rows, columns) < 0.6) if "masked" in form else None
    values, places = (packed.compressed, packed.bitmask) if "packed" in form else (dense, None)
    bits = None if masked is None else pack_mask(masked)
    a, b, x = torch.randn(rank, columns), torch.randn(rows, rank), torch.randn(tokens, columns).to(dtype)
    parts = [None if part is None else part.to(DEVICE) for part in (x, None, values, places, a, b, bits)]
    found = multiply_triton(*parts)
    weight = torch.where(kept if masked is None else masked, dense.double() + b.double() @ a.double(), 0).to(DEVICE)
    agree([found], lambda wide: [linear(parts[0].to(wide), weight)], dtype)
