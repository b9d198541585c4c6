import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_variator.bitmask import pack_mask, unpack_mask
from peft_variator.tuners.sparse_lora.fingerprints import fingerprint, matches_fingerprint


def random_mask(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(rows=st.integers(0, 5), columns=st.integers(0, 35), seed=st.integers(0, 1000))
def test_packing_is_the_loop_over_bits(rows: int, columns: int, seed: int) -> None:
    mask = random_mask(rows, columns, seed)
    expected = torch.zeros(rows, (columns + 7) // 8, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            if mask[row, column]:
                expected[row, column // 8] += 1 << (column % 8)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, expected)
    assert torch.equal(unpack_mask(packed, columns), mask)


def test_a_mask_takes_one_bit_a_weight() -> None:
    assert pack_mask(random_mask(16, 64, 0)).nbytes == 16 * 64 // 8


def test_masks_that_are_not_contiguous_are_packed_right() -> None:
    mask = random_mask(9, 13, 0)
    assert torch.equal(unpack_mask(pack_mask(mask.t()), 9), mask.t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_survives_a_cast(dtype: torch.dtype, stored_dtype: torch.dtype) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(stored_dtype) * 0.02
    assert matches_fingerprint(fingerprint(weight), weight.to(dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.flip(0),
        lambda w: w.flip(1),
        lambda w: w * 1.001,
        lambda w: -w,
        lambda w: torch.where(w.abs() < w.abs().median(), 0.0, w),
        lambda w: w + torch.nn.functional.one_hot(torch.tensor(5), 24) * 1e-4,
        lambda w: torch.randn(40, 24, generator=torch.Generator().manual_seed(1)) * 0.02,
        lambda w: w * torch.nan,
    ],
    ids=["rows", "columns", "scaled", "sign", "pruned", "one column", "other", "nan"],
)
def test_fingerprint_tells_other_weights_apart(change) -> None:
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 0.02
    assert not matches_fingerprint(fingerprint(weight), change(weight))


def test_fingerprint_of_an_antisymmetric_change_in_a_square_weight() -> None:
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)) * 0.1
    assert not matches_fingerprint(fingerprint(weight), weight + noise - noise.t())


def test_fingerprint_does_not_depend_on_how_rows_are_split() -> None:
    weight = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    assert matches_fingerprint(fingerprint(weight), weight.t().contiguous().t())
    norm = fingerprint(weight).view(torch.float64)[1]
    assert norm == pytest.approx(weight.double().norm().item(), rel=1e-12)


def test_fingerprint_is_not_touched_by_casting_a_model() -> None:
    module = torch.nn.Module()
    module.register_buffer("source", fingerprint(torch.ones(2, 3)))
    before = module.source.clone()
    assert torch.equal(module.half().source, before)
