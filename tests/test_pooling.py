"""Embeddings of whole inputs: half precision and masks of any kind give what double precision and 0 or 1 give."""

from __future__ import annotations

import pytest
import torch

from peft_variator.pooling import POOLINGS, pool


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_texts_in_half_precision(dtype: torch.dtype, pooling: str) -> None:
    """512 states of 200 sum up to more than float16 holds."""
    torch.manual_seed(0)
    hidden = (200 + torch.randn(2, 512, 3)).to(dtype)
    mask = torch.ones(2, 512, dtype=torch.long)
    mask[1, :100] = 0
    found = pool(hidden, mask, pooling)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), pool(hidden.double(), mask, pooling), rtol=5e-3, atol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_whatever_is_not_0_is_a_real_token(pooling: str) -> None:
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    wanted = pool(hidden, mask, pooling)
    for other in (mask.bool(), mask * 2, mask * 0.5, -mask):
        assert torch.equal(pool(hidden, other, pooling), wanted)
