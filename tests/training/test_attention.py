"""Attention of short sequences in half precision, which training on a CPU computes in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from peft_variator.training.attention import LONGEST, AttentionInFloat32


def vectors(length: int, dtype: torch.dtype, heads: int = 4) -> Tensor:
    return torch.randn(2, heads, length, 8).to(dtype).requires_grad_()


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(output, inputs, torch.randint(-3, 4, output.shape).to(output.dtype)))


FLAGS = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
FLAGS[..., 0] = True
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "flags": {"attn_mask": FLAGS},
    "numbers": {"attn_mask": torch.zeros(2, 1, 6, 6).masked_fill(~FLAGS, -1e4)},
    "fewer keys": {"enable_gqa": True, "scale": 0.5},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_those_of_float32_rounded_once(call: str, dtype: torch.dtype) -> None:
    options = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in CALLS[call].items()
    }
    query = vectors(6, dtype)
    key, value = (vectors(6, dtype, heads=2 if "enable_gqa" in options else 4) for _ in range(2))
    exact = [each.detach().float().requires_grad_() for each in (query, key, value)]
    wide = {
        name: each.float() if torch.is_tensor(each) and each.dtype == dtype else each for name, each in options.items()
    }
    expected = attend(*exact, **wide)
    with AttentionInFloat32():
        output = attend(query, key, value, **options)
        found = gradients(output, query, key, value)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype), rtol=0, atol=0)
    for each, other in zip(found, gradients(expected, *exact), strict=True):
        torch.testing.assert_close(each, other.to(dtype))


def test_arguments_by_name_and_autocast() -> None:
    query, key, value = (vectors(6, torch.bfloat16) for _ in range(3))
    with AttentionInFloat32(), torch.autocast("cpu", torch.bfloat16):
        output = attend(query=query, key=key, value=value)
    expected = attend(query.float(), key.float(), value.float()).bfloat16()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("length", "dtype"), [(6, torch.float32), (6, torch.float64), (LONGEST + 1, torch.bfloat16)])
def test_what_is_not_slow_stays(length: int, dtype: torch.dtype) -> None:
    inputs = [vectors(length, dtype) for _ in range(3)]
    with AttentionInFloat32():
        output = attend(*inputs)
    torch.testing.assert_close(output, attend(*inputs), rtol=0, atol=0)
