"""Packing and unpacking against plain loops, in every dtype and odd shapes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_variator.bases import packing
from peft_variator.bases.packing import LayoutError, PackedWeight
from peft_variator.bitmask import unpack_mask

from .reference import DTYPES, reference_bits, reference_pack, reference_unpack, same_bits, two_four


sizes = st.tuples(st.integers(0, 9), st.integers(1, 9).map(lambda groups: 4 * groups))


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=sizes, seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_pack_follows_the_description(dtype, size, seed):
    weight = two_four(*size, dtype, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = 0  # groups with 0 and 1
    packed = packing.pack(weight)
    compressed, bitmask = reference_pack(weight)
    assert same_bits(packed.compressed, compressed)
    assert torch.equal(packed.bitmask, bitmask)
    assert packed.shape.dtype == torch.int64
    assert packed.shape.tolist() == [[size[0]], [size[1]]]


@pytest.mark.parametrize("dtype", DTYPES)
@given(size=sizes, seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_unpack_gives_back_the_weight_bit_for_bit(dtype, size, seed):
    weight = two_four(*size, dtype, seed)
    packed = packing.pack(weight)
    unpacked = packing.unpack(packed.compressed, packed.bitmask, size[1])
    assert same_bits(unpacked, weight)
    assert same_bits(unpacked, reference_unpack(packed.compressed, packed.bitmask, size[1]))
    assert torch.equal(unpack_mask(packed.bitmask, size[1]) | (weight == 0), torch.ones(size, dtype=torch.bool))
    assert same_bits(packing.gather_kept(weight, packed.bitmask), packed.compressed)


@pytest.mark.parametrize("width", [1024, 1028])
def test_weights_larger_than_a_block(width):
    weight = two_four(1100, width)
    packed = packing.pack(weight)
    assert same_bits(packing.unpack(packed.compressed, packed.bitmask, width), weight)
    assert packing.is_two_four(weight)
    packing.check_packed(packed, "layer")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_are_values(dtype):
    weight = torch.tensor([[float("nan"), 0, 0, float("-inf"), 0, float("inf"), 0, 1]], dtype=dtype)
    packed = packing.pack(weight)
    assert same_bits(packing.unpack(packed.compressed, packed.bitmask, 8), weight)


def test_every_zero_is_positive():
    weight = torch.tensor([[-0.0, -0.0, 1.0, -0.0, -0.0, -0.0, -0.0, -0.0]])
    packed = packing.pack(weight)
    assert not packed.compressed.signbit().any()
    assert not packing.unpack(packed.compressed, packed.bitmask, 8).signbit().any()


def test_a_16_bit_weight_takes_0_5625_of_its_bytes():
    weight = two_four(64, 128, torch.bfloat16)
    packed = packing.pack(weight)
    assert (packed.compressed.nbytes + packed.bitmask.nbytes) / weight.nbytes == 0.5625


def test_unpack_fills_the_buffer_it_is_given():
    weight = two_four(3, 8)
    packed = packing.pack(weight)
    buffer = torch.full((3, 8), float("nan"))
    assert packing.unpack(packed.compressed, packed.bitmask, 8, out=buffer) is buffer
    assert same_bits(buffer, weight)


def test_unpack_takes_every_dtype_that_is_stored():
    bitmask = torch.tensor([[0x35]], dtype=torch.uint8)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        values = torch.tensor([[1, 2, -3, 4]]).to(dtype)
        unpacked = packing.unpack(values, bitmask, 8)
        assert unpacked.to(torch.float32).tolist() == [[1, 0, 2, 0, -3, 4, 0, 0]]


def test_pack_names_weight_row_and_columns():
    weight = two_four(700, 1024)
    weight[611, 12:16] = 1
    with pytest.raises(LayoutError, match=r"mlp\.up, row 611: columns 12 to 15 have 4 non-zero weights"):
        packing.pack(weight, "mlp.up")
    assert not packing.is_two_four(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 6), "6 inputs, which do not fill groups of 4"),
        (torch.zeros(2, 0), "0 inputs"),
        (torch.zeros(8), r"shape \(8,\)"),
        (torch.zeros(2, 2, 4), r"shape \(2, 2, 4\)"),
        (torch.zeros(2, 8, dtype=torch.int8), "torch.int8"),
        (torch.zeros(2, 8, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    ],
)
def test_pack_refuses_what_is_no_weight(weight, message):
    with pytest.raises(LayoutError, match=message):
        packing.pack(weight)
    assert not packing.is_two_four(weight)


@given(size=sizes, seed=st.integers(0, 2**16), data=st.data())
@settings(max_examples=60, deadline=None)
def test_check_bitmask_accepts_two_of_four_alone(size, seed, data):
    rows, columns = max(size[0], 1), size[1]
    bitmask = packing.pack(two_four(rows, columns, seed=seed)).bitmask
    packing.check_bitmask(bitmask, columns)
    row, bit = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 8 * bitmask.shape[1] - 1))
    bitmask[row, bit // 8] ^= 1 << (bit % 8)  # any flipped bit breaks a group, or lies past the end
    with pytest.raises(LayoutError, match=rf"^m, row {row}: "):
        packing.check_bitmask(bitmask, columns, "m")


def test_check_bitmask_says_what_is_wrong():
    good = reference_bits(torch.tensor([[True, True, False, False] * 3]))
    one = good.clone()
    one[0, 1] = 0x1
    with pytest.raises(LayoutError, match="columns 8 to 11 keep 1 weights"):
        packing.check_bitmask(one, 12)
    past = good.clone()
    past[0, 1] = 0x33
    with pytest.raises(LayoutError, match="bits are set past the last column, 11"):
        packing.check_bitmask(past, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": torch.tensor([[4], [6]])}, r"layer\.shape holds \[4, 6\]"),
        ({"shape": torch.tensor([4, 8, 1])}, r"layer\.shape holds \[4, 8, 1\]"),
        ({"shape": torch.tensor([-4, 8])}, r"layer\.shape holds \[-4, 8\]"),
        ({"shape": torch.tensor([5, 8])}, r"layer\.compressed has shape \(4, 4\), but a 2:4 weight of 5×8"),
        ({"bitmask": torch.zeros(4, 2, dtype=torch.uint8)}, r"layer\.bitmask has shape \(4, 2\)"),
        ({"bitmask": torch.zeros(4, 1, dtype=torch.int8)}, r"layer\.bitmask is torch\.int8"),
        ({"bitmask": torch.zeros(4, 1, dtype=torch.uint8)}, r"layer\.bitmask, row 0: columns 0 to 3 keep 0 weights"),
    ],
)
def test_check_packed_names_the_tensor(change, message):
    packed = packing.pack(two_four(4, 8))
    packing.check_packed(packed, "layer")
    packing.check_packed(packed._replace(shape=packed.shape.flatten()), "layer")  # written flat by some
    with pytest.raises(LayoutError, match=message):
        packing.check_packed(PackedWeight(**{**packed._asdict(), **change}), "layer")
