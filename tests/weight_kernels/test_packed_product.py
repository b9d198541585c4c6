"""The product of the packed form agrees with unpacking on every instruction set, and runs only where it is faster."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from peft_variator.bases import Sparse24Linear
from peft_variator.bases.linear import describe_path
from peft_variator.bases.packing import pack
from peft_variator.profiling import count_flops
from peft_variator.weight_kernels import compiled
from peft_variator.weight_kernels.compiled import LEVELS, SWITCH, _library, find_compiler, load_compiled
from peft_variator.weight_kernels.product import MAX_TOKENS, FewTokensWeight, can_multiply, is_faster, multiply
from tests.bases.reference import prune_two_four, reference_unpack, same_bits, two_four_linear

from .levels import needs_product


DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(1, 4), (3, 12), (5, 36), (17, 100), (33, 260), (9, 512), (64, 1028)]


@pytest.fixture(autouse=True)
def product() -> Iterator[None]:
    """What a test changed of the environment is forgotten."""
    load_compiled.cache_clear()
    yield
    load_compiled.cache_clear()


def drawn(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, 2:4 weight and bias, other ones in each run."""
    weight = prune_two_four(torch.randn(rows, columns), seed=int(torch.randint(1 << 30, ()))).to(dtype)
    return torch.randn(tokens, columns).to(dtype), weight, torch.randn(rows).to(dtype) if bias else None


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_unpacking(level: int, dtype: torch.dtype) -> None:
    needs_product(level)
    print("seed", torch.seed())
    for rows, columns in SHAPES:
        for tokens in (1, 2, 3, 5, 8, MAX_TOKENS):
            for bias in (True, False):
                x, weight, offset = drawn(rows, columns, tokens, dtype, bias)
                packed = pack(weight)
                found = multiply(x, offset, FewTokensWeight(packed.compressed, packed.bitmask), level)
                unpacked = reference_unpack(packed.compressed, packed.bitmask, columns).double()
                exact = F.linear(x.double(), unpacked, None if offset is None else offset.double())
                sizes = F.linear(x.double().abs(), unpacked.abs(), None if offset is None else offset.double().abs())
                allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * sizes
                assert found.dtype == dtype
                assert (found.double() - exact).abs().le(allowed).all(), (rows, columns, tokens, bias)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_comes_out_where_it_does_by_unpacking(level: int, dtype: torch.dtype) -> None:
    needs_product(level)
    x, weight, _ = drawn(8, 68, 3, dtype, False)
    x[0, 5], x[1, 66] = float("inf"), float("nan")
    weight[2, weight[2].nonzero()[0]] = float("-inf")
    packed = pack(weight)
    found, expected = multiply(x, None, FewTokensWeight(packed.compressed, packed.bitmask), level), F.linear(x, weight)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_bfloat16_is_rounded_to_the_nearest(level: int) -> None:
    """1 + 2⁻⁸ lies between two bfloat16, and goes to the even one; 1 + 3·2⁻⁸ likewise."""
    needs_product(level)
    x = torch.tensor([[1.0, 2**-8, 0.0, 0.0], [1.0, 3 * 2**-8, 0.0, 0.0]], dtype=torch.bfloat16)
    packed = pack(torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.bfloat16))
    found = multiply(x, None, FewTokensWeight(packed.compressed, packed.bitmask), level)
    assert found.flatten().tolist() == [1.0, 1 + 2**-6]


def large(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Sparse24Linear:
    return Sparse24Linear.from_dense(two_four_linear(512, 1024, dtype, bias))


def rounding(exact: Tensor, sizes: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """How far a sum of products may lie off in any order: n·u of the sum of sizes (Higham 2002, section 3.1).

    It is summed in single precision at least, and rounded at the end, twice at most.
    """
    assert terms < 2**16  # where n·u is as good as n·u / (1 − n·u)
    return torch.finfo(dtype).eps * exact.abs() + terms * torch.finfo(torch.float32).eps / 2 * sizes


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1024,), (1, 1024), (2, 3, 1024), (40, 1024)], ids=str)
def test_a_layer_gives_the_output_and_the_gradient_of_the_dense_one(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    layer = large(dtype)
    weight, bias = (each.detach().double() for each in (layer.to_dense().weight, layer.bias))
    x = torch.randn(shape).to(dtype).requires_grad_()
    found, exact = layer(x), F.linear(x.double(), weight, bias)
    allowed = rounding(exact, F.linear(x.double().abs(), weight.abs(), bias.abs()), x.shape[-1] + 1, dtype)
    assert (found.double() - exact).abs().le(allowed).all()
    with torch.no_grad():
        assert (layer(x).double() - exact).abs().le(allowed).all()
    given = torch.randn(found.shape).to(dtype)
    gradient, exact = torch.autograd.grad(found, x, given)[0], given.double() @ weight
    allowed = rounding(exact, given.double().abs() @ weight.abs(), given.shape[-1], dtype)
    assert (gradient.double() - exact).abs().le(allowed).all()


def test_what_is_faster_is_measured_once_a_shape() -> None:
    needs_product()
    layer, calls = large(), []

    def taking(seconds: float) -> Callable[[], Tensor]:
        def dense() -> Tensor:
            calls.append(seconds)
            if seconds:
                time.sleep(seconds)
            return torch.empty(0)

        return dense

    def asked(tokens: int, seconds: float, parts: Sparse24Linear = layer) -> bool:
        x = torch.randn(tokens, 1024).bfloat16()
        return is_faster(x, parts.bias, FewTokensWeight(parts.compressed, parts.bitmask), taking(seconds))

    assert asked(13, 0.5)
    measured = len(calls)
    assert measured > 0
    assert asked(13, 0.0)  # remembered
    assert len(calls) == measured
    assert not asked(14, 0.0)
    assert not asked(MAX_TOKENS + 1, 0.5)
    small = Sparse24Linear.from_dense(two_four_linear(60, 1024, torch.bfloat16))
    assert not asked(1, 0.5, small)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("CXX", "no-such-compiler", "no-such-compiler"), ("CXX", "false", "false failed"), (SWITCH, "0", f"{SWITCH}=0")],
)
def test_without_it_layers_unpack_and_say_why(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    load_compiled.cache_clear()
    layer, x = large(), torch.randn(1, 1024).bfloat16()
    with torch.no_grad():
        assert same_bits(layer(x), layer.to_dense()(x))
    assert reason in describe_path(layer)
    with pytest.raises(RuntimeError, match=reason):
        multiply(x, layer.bias, FewTokensWeight(layer.compressed, layer.bitmask))


def test_a_compiler_that_says_what_nobody_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"#!/bin/sh\nprintf 'In file included\\nerror: ung\\374ltig\\n' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_compiled.cache_clear()
    assert load_compiled("products").function is None
    assert "error: ung" in load_compiled("products").reason


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_library_is_compiled_anew(left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_product()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_compiled.cache_clear()
    path = _library(str(find_compiler()), Path(compiled.__file__).with_name("unpacking.cpp"))
    path.write_bytes(path.read_bytes()[:left])
    assert load_compiled("unpacking").function is not None
    assert path.stat().st_size > 1000


def test_a_forked_process_that_ends_leaves_the_folder_of_its_parent() -> None:
    code = "import os, sys; from peft_variator.weight_kernels.compiled import _scratch; folder = _scratch(); "
    code += "child = os.fork(); child or sys.exit(); os.waitpid(child, 0); print(folder.is_dir(), folder)"
    there, folder = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert there == "True"
    assert not Path(folder).exists()


def test_forward_mode_differentiation_sees_few_tokens() -> None:
    layer, x = large(torch.float32), torch.randn(1, 1024)
    with torch.no_grad(), forward_ad.dual_level():
        found = [
            forward_ad.unpack_dual(each(forward_ad.make_dual(x, x))).tangent for each in (layer, layer.to_dense())
        ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_bias_that_is_broadcast() -> None:
    layer, x = large(torch.float32), torch.randn(1, 1024)
    packed = FewTokensWeight(layer.compressed, layer.bitmask)
    assert can_multiply(x, torch.zeros(layer.out_features), packed) == (load_compiled("products").level >= 0)
    assert not can_multiply(x, torch.zeros(1), packed)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    needs_product()
    layer = large()
    with pytest.raises(RuntimeError, match=r"level is 9"):
        multiply(torch.randn(1, 1024).bfloat16(), layer.bias, FewTokensWeight(layer.compressed, layer.bitmask), 9)


def test_who_counts_operators_or_transforms_functions_misses_nothing() -> None:
    layer, x = large(torch.float32), torch.randn(3, 1, 1024)
    assert count_flops(layer, {"input": x[:1, 0]}) == 2 * 512 * 1024
    with torch.no_grad():
        found, expected = torch.func.vmap(layer)(x), layer.to_dense()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_large_layers_say_what_few_tokens_take() -> None:
    needs_product()
    assert LEVELS[load_compiled("products").level] in describe_path(large())
    assert LEVELS[min(load_compiled("products").level, 2)] in describe_path(large(torch.float32))
    assert "float16" in describe_path(large(torch.float16))
