"""(W + B·A) ⊙ M made whole, and the gradients through it, are those of double precision, alone and in training."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_variator import SparseLoraConfig
from peft_variator.bases import Sparse24Linear
from peft_variator.tuners.sparse_lora import functional
from peft_variator.weight_kernels import masked_weight
from peft_variator.weight_kernels.masked_weight import can_sum, sum_gradients, sum_weight
from tests.bases.reference import two_four_linear

from .levels import needs_product
from .test_masked_product import DTYPES, FORMS, drawn


AVX512 = 2


@pytest.mark.parametrize("matrix_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_double_precision(form: str, dtype: torch.dtype, matrix_dtype: torch.dtype) -> None:
    needs_product(AVX512)
    print("seed", torch.seed())
    sizes = [(1, 4), (3, 12), (5, 36), (9, 64), (17, 100), (8, 260)]
    sizes += [] if form.startswith("packed") else [(1, 1), (7, 3), (4, 9), (9, 31), (10, 47), (6, 133)]
    for rows, columns in sizes:
        for rank in (1, 8, 33):
            stored, weight, kept = drawn(form, rows, columns, rank, dtype)
            assert stored.a is not None
            assert stored.b is not None
            a, b = stored.a.double(), stored.b.double()
            # Two more rows, to see that nothing is written past the end.
            out = torch.full((rows + 2, columns), 7, dtype=matrix_dtype)
            found = sum_weight(stored, out[:rows])
            exact = (weight.double() + b @ a) * kept
            sizes_summed = weight.double().abs() + b.abs() @ a.abs()
            allowed = torch.finfo(matrix_dtype).eps * exact.abs() + 1e-6 * sizes_summed
            assert (found - exact).abs().le(allowed).all(), (rows, columns, rank)
            assert found.masked_select(~kept).eq(0).all()
            assert out[rows:].eq(7).all()

            gradient = torch.randn(rows, columns).to(matrix_dtype)
            masked = gradient.double() * kept
            of_a, of_b = sum_gradients(stored, gradient)
            assert of_a.dtype == of_b.dtype == torch.float32
            assert (of_a - b.t() @ masked).abs().le(1e-6 * (b.abs().t() @ masked.abs()) + 1e-12).all()
            assert (of_b - masked @ a.t()).abs().le(1e-6 * (masked.abs() @ a.abs().t()) + 1e-12).all()


@pytest.mark.parametrize("form", FORMS)
def test_what_the_mask_takes_out_is_not_seen_even_where_it_is_not_finite(form: str) -> None:
    needs_product(AVX512)
    stored, _, kept = drawn(form, 9, 68, 4, torch.bfloat16)
    gradient = torch.where(kept, torch.randn(9, 68), float("nan"))
    assert all(part.isfinite().all() for part in sum_gradients(stored, gradient))
    gradient[kept.nonzero()[0, 0], kept.nonzero()[0, 1]] = float("nan")
    of_a, of_b = sum_gradients(stored, gradient)
    assert of_a.isnan().any(dim=0).nonzero().flatten().tolist() == [int(kept.nonzero()[0, 1])]
    assert of_b.isnan().any(dim=1).nonzero().flatten().tolist() == [int(kept.nonzero()[0, 0])]


def test_threads_share_the_rows() -> None:
    needs_product(AVX512)
    stored, _, _ = drawn("packed", 70, 132, 5, torch.float32)
    gradient, before = torch.randn(70, 132), torch.get_num_threads()
    alone = sum_weight(stored, torch.empty(70, 132)), *sum_gradients(stored, gradient)
    torch.set_num_threads(3)
    try:
        shared = sum_weight(stored, torch.empty(70, 132)), *sum_gradients(stored, gradient)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], shared[0])
    assert torch.equal(alone[2], shared[2])
    torch.testing.assert_close(alone[1], shared[1])


class OneLayer(nn.Module):
    """A model of one linear layer."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Its output."""
        return self.linear(x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_training_step_is_that_of_plain_operators(dtype: torch.dtype, packed: bool, autocast: bool) -> None:
    needs_product(AVX512)
    base = two_four_linear(256, 512, dtype)
    model = get_peft_model(
        OneLayer(Sparse24Linear.from_dense(base) if packed else base),
        SparseLoraConfig(r=8, target_modules=["linear"], init_lora_weights=False),
    )
    x = torch.randn(40, 512, dtype=dtype)

    def step() -> list[Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = model(given)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [given, *parameters])]

    with patch.object(functional, "sum_gradients", wraps=sum_gradients) as called:
        fast = step()
    assert called.called
    with patch.object(functional, "can_sum", return_value=False):
        plain = step()
    tolerance = 3e-2 if autocast or dtype == torch.bfloat16 else 1e-5
    for found, expected in zip(fast, plain, strict=True):
        assert found.dtype == expected.dtype
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < tolerance


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_product(AVX512)
    stored, _, _ = drawn("dense", 256, 256, 4, torch.float32)
    matrix = torch.empty(256, 256)
    assert can_sum(stored, matrix)
    assert not can_sum(stored._replace(a=None, b=None), matrix)
    assert not can_sum(stored, matrix.half())
    assert not can_sum(stored, torch.empty(256, 512)[:, ::2])
    assert not can_sum(stored._replace(values=stored.values.to("meta")), matrix)
    assert not can_sum(drawn("dense", 8, 8, 4, torch.float32)[0], torch.empty(8, 8))
    monkeypatch.setattr(masked_weight, "_MAX_RANK", 3)
    assert not can_sum(stored, matrix)
