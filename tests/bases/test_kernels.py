"""Which product is chosen where: asked for devices that need not be there."""

from __future__ import annotations

import pytest
import torch

from peft_variator.bases import Sparse24Linear
from peft_variator.bases.kernels import Accelerator, build_sparse_weight, choose_kernel

from .reference import two_four, two_four_linear


HOPPER = Accelerator("cuda", (9, 0), cusparselt=True)
AMPERE_WITHOUT = Accelerator("cuda", (8, 6), cusparselt=False)


@pytest.mark.parametrize(
    ("size", "dtype", "accelerator", "kernel", "reason"),
    [
        ((4096, 4096), torch.bfloat16, HOPPER, "cusparselt", "bfloat16 4096×4096 qualifies for cusparselt"),
        ((16, 16), torch.float16, HOPPER, "cusparselt", "float16 16×16 qualifies"),
        ((32, 64), torch.bfloat16, AMPERE_WITHOUT, "cutlass", "qualifies for cutlass"),
        ((24, 64), torch.bfloat16, HOPPER, "dense", "24×64 is no multiple of 16×16, which cusparselt needs"),
        ((64, 40), torch.bfloat16, HOPPER, "dense", "64×40 is no multiple of 16×16"),
        ((16, 16), torch.bfloat16, AMPERE_WITHOUT, "dense", "16×16 is no multiple of 32×64, which cutlass needs"),
        ((0, 16), torch.bfloat16, HOPPER, "dense", "no multiple"),
        ((4096, 4096), torch.float32, HOPPER, "dense", "bfloat16 or float16, not float32"),
        ((4096, 4096), torch.bfloat16, Accelerator("cuda", (7, 5), True), "dense", "cuda with compute capability 7.5"),
        ((4096, 4096), torch.bfloat16, Accelerator("cuda", (9, 0), False), "dense", "no cuSPARSELt"),
        ((4096, 4096), torch.bfloat16, Accelerator("cpu"), "dense", "not cpu"),
        ((4096, 4096), torch.bfloat16, Accelerator("mps"), "dense", "not mps"),
    ],
)
def test_choice_and_reason(size, dtype, accelerator, kernel, reason):
    choice = choose_kernel(*size, dtype, accelerator)
    assert choice.kernel == kernel
    assert reason in choice.reason


def test_a_layer_reports_its_choice():
    layer = Sparse24Linear.from_dense(two_four_linear(16, 16, torch.bfloat16))
    assert layer.kernel().kernel == "dense"
    assert "not cpu" in layer.kernel().reason
    layer.offloaded = True
    assert "offloaded" in layer.kernel().reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_tensor_cores_agree_within_rounding(dtype):
    dense = two_four_linear(256, 512, dtype).cuda()
    layer = Sparse24Linear.from_dense(dense)
    if layer.kernel().kernel == "dense":
        pytest.skip(layer.kernel().reason)
    x = torch.randn(3, 64, 512, device="cuda", dtype=dtype, requires_grad=True)
    expected, actual = dense(x), layer(x)
    exact = torch.nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    scale = torch.finfo(dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= scale
    wanted = torch.autograd.grad(expected.sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(actual.sum(), x)[0], wanted, atol=float(scale))
    sparse = build_sparse_weight(two_four(256, 512, dtype).cuda(), layer.kernel().kernel)
    assert torch.equal(sparse.to_dense(), two_four(256, 512, dtype).cuda())
