"""Unpacking in C++ moves the bits that a plain loop moves, on every instruction set, and is used for large weights."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn

from peft_variator.bases import packing
from peft_variator.bases.packing import pack, unpack
from peft_variator.weight_kernels.compiled import LEVELS, SWITCH, load_compiled
from peft_variator.weight_kernels.unpacking import can_unpack, unpack_into
from tests.bases.reference import reference_unpack, same_bits, two_four

from .levels import needs_product


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = (66, 1028)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_moves_the_bits_that_a_loop_moves(level: int, dtype: torch.dtype) -> None:
    needs_product(level)
    seed = torch.seed() % 2**31
    print("seed", seed)
    for rows, columns in [(0, 8), (1, 4), (3, 12), (5, 36), (17, 100), (33, 260), (9, 512), (64, 1028)]:
        weight = two_four(rows, columns, dtype, seed)
        if rows:
            weight[0, weight[0].nonzero()[0]] = float("nan")
        packed = pack(weight)
        out = torch.full((rows + 1, columns), 7, dtype=dtype)
        unpack_into(packed.compressed, packed.bitmask, out[:rows], level)
        assert same_bits(out[:rows], reference_unpack(packed.compressed, packed.bitmask, columns))
        assert out[rows:].eq(7).all()  # nothing is written past the end


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_large_weights_are_unpacked_by_it(dtype: torch.dtype, threads: int) -> None:
    needs_product()
    weight = two_four(*LARGE, dtype)
    packed, before = pack(weight), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.object(packing, "unpack_into", wraps=unpack_into) as called:
            assert same_bits(unpack(packed.compressed, packed.bitmask, LARGE[1]), weight)
    finally:
        torch.set_num_threads(before)
    assert called.called == (dtype != torch.float64)


def test_rows_of_a_larger_weight_and_positions_that_are_not_contiguous() -> None:
    needs_product()
    weight = two_four(2 * LARGE[0], LARGE[1])
    packed = pack(weight)
    half = unpack(packed.compressed[::2], packed.bitmask[::2], LARGE[1])
    assert same_bits(half, weight[::2])


def test_without_a_compiler_and_for_what_is_no_plain_tensor_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_product()

    class Marked(torch.Tensor):
        pass

    packed = pack(two_four(8, 8))
    out = torch.empty(8, 8)
    assert can_unpack(packed.compressed, packed.bitmask, out)
    assert can_unpack(nn.Parameter(packed.compressed), packed.bitmask, out)
    assert not can_unpack(packed.compressed.as_subclass(Marked), packed.bitmask, out)
    assert not can_unpack(packed.compressed, packed.bitmask.to("meta"), out)
    assert not can_unpack(packed.compressed.double(), packed.bitmask, out.double())
    monkeypatch.setenv(SWITCH, "0")
    load_compiled.cache_clear()
    try:
        assert not can_unpack(packed.compressed, packed.bitmask, out)
    finally:
        monkeypatch.undo()
        load_compiled.cache_clear()
