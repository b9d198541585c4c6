from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_variator.bases.packing import pack
from peft_variator.bitmask import pack_mask
from peft_variator.tuners.sparse_lora import functional
from peft_variator.tuners.sparse_lora.base_weight import get_layout
from peft_variator.tuners.sparse_lora.functional import MaskedWeight, effective_weight, masked_linear

from .cases import plain_weight


SCALE = 1.5


def make(rows=6, columns=10, rank=3, shape=(4,), dtype=torch.float64, seed=0, bias=True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(rows, columns, generator=generator) < 0.5
    tensors = {
        "x": normal(*shape, columns),
        "a": normal(rank, columns),
        "b": normal(rows, rank),
        "weight": normal(rows, columns),
        "mask": mask,
        "grad": normal(*shape, rows),
    }
    if bias:
        tensors["bias"] = normal(rows)
    return tensors


def frozen_base(tensors: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> MaskedWeight:
    """One adapter on a weight that has its mask in its zeros."""
    return MaskedWeight([a], [b], [SCALE], None, "linear", [tensors["weight"]])


def run(tensors: dict[str, torch.Tensor], compute: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of x, A, B and the bias."""
    leaves = [tensors[name].clone().requires_grad_() for name in ("x", "a", "b", "bias") if name in tensors]
    y = compute(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors["grad"])]


def plain(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    def compute(x, a, b, bias=None):
        weight = plain_weight(tensors["weight"], tensors["mask"], [(SCALE, a, b)])
        y = x @ weight.t()
        return y if bias is None else y + bias

    return run(tensors, compute)


def ours(
    tensors: dict[str, torch.Tensor], recompute: bool, stored: bool, layout: str = "linear"
) -> list[torch.Tensor]:
    weight = tensors["weight"] if stored else torch.where(tensors["mask"], tensors["weight"], 0.0)
    packed = pack_mask(tensors["mask"]) if stored else None
    base = [weight.t().contiguous() if layout == "conv1d" else weight]
    return run(
        tensors,
        lambda x, a, b, bias=None: masked_linear(
            x, MaskedWeight([a], [b], [SCALE], packed, layout, base), bias, recompute
        ),
    )


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 20),
    rank=st.integers(1, 4),
    shape=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 3, 2)]),
    bias=st.booleans(),
    recompute=st.booleans(),
    stored=st.booleans(),
    layout=st.sampled_from(["linear", "conv1d"]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_autograd(
    rows, columns, rank, shape, bias, recompute, stored, layout, seed
) -> None:
    tensors = make(rows, columns, rank, shape, seed=seed, bias=bias)
    for found, expected in zip(ours(tensors, recompute, stored, layout), plain(tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def blocks_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 10 to 14 columns are handled two rows at a time."""
    monkeypatch.setattr(functional, "_BLOCK_ON_CPUS", 29)


@pytest.mark.usefixtures("blocks_of_two_rows")
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_a_weight_in_blocks_of_rows(rows: int, recompute: bool, stored: bool, layout: str) -> None:
    tensors = make(rows=rows, columns=11)
    for found, expected in zip(ours(tensors, recompute, stored, layout), plain(tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("blocks_of_two_rows")
@pytest.mark.parametrize("stored", [True, False])
def test_an_effective_weight_in_blocks_of_rows(stored: bool) -> None:
    tensors = make(rows=7, columns=12)
    weight = tensors["weight"] if stored else torch.where(tensors["mask"], tensors["weight"], 0.0)
    packed = pack_mask(tensors["mask"]) if stored else None
    base = [weight.reshape(7, 3, 2, 2)]  # of a convolution
    found = run(
        tensors,
        lambda x, a, b, bias: (
            x @ effective_weight(MaskedWeight([a], [b], [SCALE], packed, "conv2d", base), x.dtype).t() + bias
        ),
    )
    for ours_, expected in zip(found, plain(tensors), strict=True):
        torch.testing.assert_close(ours_, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("blocks_of_two_rows")
@pytest.mark.parametrize("recompute", [True, False])
def test_a_packed_weight_in_blocks_of_rows(recompute: bool) -> None:
    tensors = make(rows=7, columns=12)
    tensors["mask"] = torch.tensor([True, False, False, True]).expand(7, 3, 4).flatten(1)
    parts = pack(torch.where(tensors["mask"], tensors["weight"], 0.0))
    base = [parts.compressed, parts.bitmask]
    found = run(
        tensors,
        lambda x, a, b, bias: masked_linear(
            x, MaskedWeight([a], [b], [SCALE], None, "sparse24", base), bias, recompute
        ),
    )
    for ours_, expected in zip(found, plain(tensors), strict=True):
        torch.testing.assert_close(ours_, expected, rtol=1e-10, atol=1e-10)


def test_a_layout_that_cannot_tell_rows_is_handled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_ON_CPUS", 1)
    monkeypatch.setattr(functional, "get_layout", lambda name: replace(get_layout(name), rows=None))
    tensors = make()
    for found, expected in zip(ours(tensors, recompute=True, stored=True), plain(tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_effective_weight_is_rounded_once(dtype: torch.dtype) -> None:
    tensors = make(rows=40, columns=60, dtype=torch.float32)
    weight, packed = tensors["weight"].to(dtype), pack_mask(tensors["mask"])
    found = effective_weight(MaskedWeight([tensors["a"]], [tensors["b"]], [SCALE], packed, "linear", [weight]), dtype)
    exact = plain_weight(weight.double(), tensors["mask"], [(SCALE, tensors["a"].double(), tensors["b"].double())])
    assert (found == exact.to(dtype)).float().mean() > 0.99  # the others lie between two numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [True, False])
def test_every_dtype_is_right_within_its_rounding(dtype: torch.dtype, recompute: bool) -> None:
    tensors = make(rows=33, columns=65, rank=4, shape=(2, 9), dtype=dtype)
    exact = plain({name: tensor.double() if name != "mask" else tensor for name, tensor in tensors.items()})
    for found, expected in zip(ours(tensors, recompute, stored=True), exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_several_adapters_of_different_rank_and_scale() -> None:
    tensors = make()
    other = make(rank=5, seed=1)
    packed = pack_mask(tensors["mask"])
    results = []
    for compute in (
        lambda x, a, b: masked_linear(x, MaskedWeight(a, b, [1.5, -0.3], packed, "linear", [tensors["weight"]]), None),
        lambda x, a, b: (
            x @ plain_weight(tensors["weight"], tensors["mask"], list(zip([1.5, -0.3], a, b, strict=True))).t()
        ),
    ):
        x = tensors["x"].clone().requires_grad_()
        a, b = ([source[name].clone().requires_grad_() for source in (tensors, other)] for name in "ab")
        y = compute(x, a, b)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *a, *b], tensors["grad"])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [True, False])
def test_float32_adapters_on_a_bfloat16_base_keep_no_casts_of_theirs(recompute: bool) -> None:
    tensors = make(rows=64, columns=40, dtype=torch.bfloat16)
    leaves = {name: tensors[name].float().requires_grad_() for name in "ab"}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = masked_linear(
            tensors["x"].requires_grad_(),
            MaskedWeight([leaves["a"]], [leaves["b"]], [SCALE], None, "linear", [tensors["weight"]]),
            None,
            recompute,
        )
    known = {tensor.data_ptr() for tensor in (*tensors.values(), *leaves.values())}
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in known) == (0 if recompute else 64 * 40 * 2)
    y.float().sum().backward()
    assert leaves["a"].grad.dtype == torch.float32


def test_gradients_agree_with_finite_differences() -> None:
    tensors = make(rows=3, columns=5, rank=2, shape=(2,))
    packed = pack_mask(tensors["mask"])
    leaves = [tensors[name].requires_grad_() for name in ("x", "a", "b", "bias")]
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: masked_linear(
            x, MaskedWeight([a], [b], [SCALE], packed, "linear", [tensors["weight"]]), bias
        ),
        leaves,
    )


def test_dropping_the_mask_in_the_backward_would_be_noticed() -> None:
    tensors = make()
    biased = SCALE * tensors["grad"].t() @ tensors["x"] @ tensors["a"].t()
    assert not torch.allclose(ours(tensors, True, True)[3], biased)
    exact = SCALE * (tensors["grad"].t() @ tensors["x"] * tensors["mask"]) @ tensors["a"].t()
    torch.testing.assert_close(ours(tensors, True, True)[3], exact)


def saved_bytes(tensors: dict[str, torch.Tensor], recompute: bool, stored: bool) -> int:
    """Bytes that autograd keeps beyond the arguments of the call."""
    weight = tensors["weight"] if stored else torch.where(tensors["mask"], tensors["weight"], 0.0)
    packed = pack_mask(tensors["mask"]) if stored else None
    leaves = [tensors[name].clone().requires_grad_() for name in ("x", "a", "b", "bias")]
    known = {tensor.data_ptr() for tensor in (*leaves, weight, packed) if tensor is not None}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, a, b, bias = leaves
        masked_linear(x, MaskedWeight([a], [b], [SCALE], packed, "linear", [weight]), bias, recompute)
    return sum(kept.values())


@pytest.mark.parametrize("stored", [True, False])
def test_recompute_keeps_nothing_of_the_size_of_the_weight(stored: bool) -> None:
    tensors = make(rows=30, columns=40)
    assert saved_bytes(tensors, recompute=True, stored=stored) == 0
    assert saved_bytes(tensors, recompute=False, stored=stored) == 30 * 40 * 8


def test_the_input_is_not_kept_for_a_frozen_adapter() -> None:
    tensors = make()
    x = tensors["x"].clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = masked_linear(x, frozen_base(tensors, tensors["a"], tensors["b"]), None)
    assert not any(tensor.shape == x.shape for tensor in kept)
    effective = tensors["weight"] + SCALE * tensors["b"] @ tensors["a"]
    torch.testing.assert_close(torch.autograd.grad(y, x, tensors["grad"])[0], tensors["grad"] @ effective)


def test_only_the_adapter_needs_gradients() -> None:
    tensors = make()
    a, b = (tensors[name].clone().requires_grad_() for name in "ab")
    y = masked_linear(tensors["x"], frozen_base(tensors, a, b), None)
    y.backward(tensors["grad"])
    expected = SCALE * tensors["b"].t() @ (tensors["grad"].t() @ tensors["x"])
    torch.testing.assert_close(a.grad, expected)


def test_a_weight_changed_before_the_backward_raises() -> None:
    tensors = make()
    b = tensors["b"].clone().requires_grad_()
    y = masked_linear(tensors["x"], frozen_base(tensors, tensors["a"], b), None)
    tensors["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    tensors = make()
    b = tensors["b"].clone().requires_grad_()
    y = masked_linear(tensors["x"], frozen_base(tensors, tensors["a"], b), None)
    (first,) = torch.autograd.grad(y.square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_around_the_backward_changes_nothing() -> None:
    tensors = make(dtype=torch.float32)
    expected = ours(tensors, recompute=True, stored=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(tensors, recompute=True, stored=True)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stored", [True, False])
def test_effective_weight_and_its_gradients(stored: bool) -> None:
    tensors = make()
    weight = tensors["weight"] if stored else torch.where(tensors["mask"], tensors["weight"], 0.0)
    packed = pack_mask(tensors["mask"]) if stored else None
    results = []
    for compute in (
        lambda a, b: effective_weight(MaskedWeight([a], [b], [SCALE], packed, "linear", [weight]), torch.float64),
        lambda a, b: plain_weight(weight, tensors["mask"], [(SCALE, a, b)]),
    ):
        a, b = (tensors[name].clone().requires_grad_() for name in "ab")
        result = compute(a, b)
        gradients = torch.autograd.grad(F.linear(tensors["x"], result).square().sum(), (a, b))
        results.append([result.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_kept_weights_count_negative_zero_as_pruned() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, torch.nan]])
    assert MaskedWeight([], [], [], None, "linear", [weight]).kept().tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("recompute", [True, False])
def test_operators_for_compiled_graphs_are_sound(recompute: bool) -> None:
    tensors = make(dtype=torch.float32)
    packed = pack_mask(tensors["mask"])
    update = ([tensors["a"], tensors["a"][:2]], [tensors["b"], tensors["b"][:, :2]], [SCALE, 2.0])
    arguments = (tensors["x"], *update, None, packed, "linear", [tensors["weight"]], not recompute)
    torch.library.opcheck(torch.ops.peft_variator.masked_linear.default, arguments)
    backward = (tensors["grad"], tensors["x"], *update, packed, torch.empty(0), "linear", [tensors["weight"]], True)
    torch.library.opcheck(torch.ops.peft_variator.masked_linear_backward.default, backward)
