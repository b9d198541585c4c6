import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import l1_unstructured, remove
from transformers.pytorch_utils import Conv1D

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import (
    SparseLoraConv2d,
    SparseLoraLayer,
    SparseLoraLinear,
    WeightLayout,
    register_layout,
)

from .cases import plain_weight, prune_


BASES = {
    "linear": (lambda: nn.Linear(10, 6), (3, 10)),
    "linear without bias": (lambda: nn.Linear(10, 6, bias=False), (2, 3, 10)),
    "conv1d": (lambda: Conv1D(6, 10), (2, 3, 10)),
    "square conv1d": (lambda: Conv1D(10, 10), (2, 3, 10)),
    "patches": (lambda: nn.Conv2d(3, 6, 2, stride=2), (2, 3, 8, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2, dilation=2, bias=False), (2, 4, 7, 5)),
    "reflecting conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="reflect"), (2, 4, 7, 5)),
}


def make_layer(base: nn.Module, adapters: int = 1, **fields) -> SparseLoraLayer:
    layer_class = SparseLoraConv2d if isinstance(base, nn.Conv2d) else SparseLoraLinear
    layer = layer_class(base, "module").requires_grad_(False)
    config = SparseLoraConfig(init_lora_weights=False, **fields)
    names = [f"adapter{index}" for index in range(adapters)]
    for index, name in enumerate(names):
        layer.update_layer(name, config, rank=2 + index, alpha=3.0 + index)
        if config.mask == "stored":
            mask = torch.rand(base.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            layer.attach_mask(name, mask)
    layer.set_adapter(names)
    return layer


def make_base(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = BASES[name]
    return prune_(build()).to(dtype), torch.randn(shape).to(dtype)


def reference(layer: SparseLoraLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer's function from its parameters, with torch's own operations and autograd."""
    base = layer.get_base_layer()
    transposed = isinstance(base, Conv1D)
    weight = base.weight.t() if transposed else base.weight.flatten(1)
    name = layer.active_adapters[0]
    if name in layer.sparse_low_rank_mask:
        drawn = torch.rand(base.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        mask = drawn.t() if transposed else drawn.flatten(1)
    else:
        mask = weight != 0
    updates = [
        ((3.0 + index) / (2 + index), layer.sparse_low_rank_A[name], layer.sparse_low_rank_B[name])
        for index, name in enumerate(layer.active_adapters)
    ]
    effective = plain_weight(weight, mask, updates)
    if not isinstance(base, nn.Conv2d):
        return F.linear(x, effective, base.bias)
    return base._conv_forward(x, effective.reshape(base.weight.shape), base.bias)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mask", ["weight", "stored"])
@pytest.mark.parametrize("name", BASES)
def test_every_kind_of_layer_is_the_formula(name: str, mask: str, recompute: bool, adapters: int) -> None:
    base, x = make_base(name)
    layer = make_layer(base, adapters, mask=mask, recompute=recompute)
    leaves = [x.requires_grad_(), *layer.sparse_low_rank_A.values(), *layer.sparse_low_rank_B.values()]
    results = []
    for compute in (layer, lambda x: reference(layer, x)):
        y = compute(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_merging_keeps_function_and_zeros(name: str) -> None:
    base, x = make_base(name)
    layer = make_layer(base, adapters=2)
    zeros = base.weight == 0
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    assert torch.equal(base.weight == 0, zeros)
    assert not base.weight[zeros].signbit().any()
    layer.unmerge()
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    assert torch.equal(base.weight == 0, zeros)


def test_merging_into_a_weight_in_channels_last_format() -> None:
    base, x = make_base("conv2d")
    base = base.to(memory_format=torch.channels_last)
    layer = make_layer(base)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", ["linear", "patches"])
def test_recompute_decides_what_autograd_keeps(name: str, recompute: bool) -> None:
    base, x = make_base(name)
    layer = make_layer(base, recompute=recompute)
    kept, size, known = [], base.weight.numel(), base.weight.data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == size and tensor.data_ptr() != known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.requires_grad_())
    assert len(kept) == (0 if recompute else 1)


@pytest.mark.parametrize("name", ["linear", "conv1d", "patches"])
def test_autocast_computes_in_its_dtype(name: str) -> None:
    base, x = make_base(name, torch.float32)
    layer = make_layer(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert base(x).dtype == y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact = reference(layer, x)
    expected = torch.autograd.grad(exact.square().sum(), [*layer.sparse_low_rank_A.values()])[0]
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    found = layer.sparse_low_rank_A["adapter0"].grad
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_autocast_to_float16_does_not_lose_small_weights_from_the_mask() -> None:
    base = nn.Linear(4, 1, bias=False)
    base.weight.data = torch.tensor([[1e-10, 1.0, 0.0, 1.0]])  # 1e-10 is 0 in float16
    layer = make_layer(base)
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert y.item() == pytest.approx(layer.get_delta_weight("adapter0")[0, 0].item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base_with_a_float32_adapter(dtype: torch.dtype) -> None:
    base, x = make_base("linear", dtype)
    layer = make_layer(base)
    for parameters in (layer.sparse_low_rank_A, layer.sparse_low_rank_B):
        parameters["adapter0"] = nn.Parameter(parameters["adapter0"].float())
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.sparse_low_rank_A["adapter0"].grad.dtype == torch.float32


def test_input_of_another_dtype_is_cast_unless_switched_off() -> None:
    base, x = make_base("linear", torch.float32)
    layer = make_layer(base)
    assert layer(x.bfloat16()).dtype == torch.float32
    with disable_input_dtype_casting(layer):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_an_empty_batch() -> None:
    layer = make_layer(make_base("linear")[0])
    y = layer(torch.empty(0, 10, dtype=torch.float64))
    y.sum().backward()
    assert y.shape == (0, 6)
    assert layer.sparse_low_rank_B["adapter0"].grad.eq(0).all()


def test_the_bias_can_be_trained() -> None:
    base, x = make_base("linear")
    layer = make_layer(base)
    base.bias.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(base.bias.grad, torch.full((6,), 3.0, dtype=torch.float64))


def test_delta_weight_is_under_the_mask() -> None:
    base, _ = make_base("linear")
    layer = make_layer(base)
    delta = layer.get_delta_weight("adapter0")
    expected = 1.5 * (layer.sparse_low_rank_B["adapter0"] @ layer.sparse_low_rank_A["adapter0"])
    torch.testing.assert_close(delta, torch.where(base.weight != 0, expected, 0.0))


def test_an_untrained_adapter_changes_nothing() -> None:
    base, x = make_base("linear", torch.float32)
    layer = SparseLoraLinear(base, "module")
    layer.update_layer("default", SparseLoraConfig(), rank=4, alpha=8)
    assert torch.equal(layer(x), base(x))
    before = base.weight.detach().clone()
    layer.merge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling(use_rslora: bool, scaling: float) -> None:
    layer = SparseLoraLinear(nn.Linear(5, 5), "module")
    layer.update_layer("default", SparseLoraConfig(use_rslora=use_rslora), rank=4, alpha=8)
    assert layer.scaling["default"] == scaling


def test_gaussian_initialisation() -> None:
    layer = SparseLoraLinear(nn.Linear(2000, 5), "module")
    layer.update_layer("default", SparseLoraConfig(init_lora_weights="gaussian"), rank=4, alpha=8)
    assert layer.sparse_low_rank_A["default"].std().item() == pytest.approx(0.25, rel=0.05)
    assert layer.sparse_low_rank_B["default"].eq(0).all()


@pytest.mark.parametrize(
    "base",
    [nn.Embedding(3, 4), nn.LayerNorm(4), NonDynamicallyQuantizableLinear(4, 4), nn.Conv1d(3, 4, 2)],
    ids=lambda base: type(base).__name__,
)
def test_other_layers_are_refused_by_name(base: nn.Module) -> None:
    message = f"cannot adapt the module 'block.target' of type {type(base).__name__}"
    with pytest.raises(TypeError, match=re.escape(message)):
        SparseLoraLinear(base, "block.target")


def test_quantized_weights_are_refused() -> None:
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="not quantized layers"):
        SparseLoraLinear(base, "module")


@pytest.mark.parametrize("kind", ["linear", "conv1d", "patches"])
def test_a_weight_that_is_computed_is_refused(kind: str) -> None:
    """Whatever is merged into it is lost with the next forward."""
    computed = [make_base(kind)[0] for _ in range(3)]
    l1_unstructured(computed[0], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(computed[1])
    nn.utils.spectral_norm(computed[2])
    for base in computed:
        with pytest.raises(ValueError, match=r"weight of 'block\.target' is computed.*=\['block\.target'\]"):
            SparseLoraLinear(base, "block.target")
    remove(computed[0], "weight")
    SparseLoraLinear(computed[0], "block.target")


class HalvesLinear(nn.Module):
    """A base layer that keeps its weight in two parts, the first of them with explicit positions."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(weight[weight != 0], requires_grad=False)
        self.positions = nn.Parameter(weight != 0, requires_grad=False)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _halves_weight([self.values, self.positions]))


def _halves_weight(tensors: list[torch.Tensor]) -> torch.Tensor:
    values, positions = tensors
    return torch.zeros(positions.shape, dtype=values.dtype).masked_scatter(positions, values)


def _write_halves(base: HalvesLinear, matrix: torch.Tensor) -> None:
    base.values.copy_(matrix[base.positions])


HALVES = WeightLayout(
    name="halves",
    tensors=lambda base: [base.values, base.positions],
    shape=lambda tensors: tensors[1].shape,
    weight=_halves_weight,
    kept=lambda tensors: tensors[1],
    flatten=lambda weight: weight,
    write=_write_halves,
)


def test_a_registered_packed_layer_works_like_the_dense_one() -> None:
    register_layout(HalvesLinear, HALVES)
    dense, x = make_base("linear without bias")
    packed = make_layer(HalvesLinear(dense.weight.detach()))
    expected = make_layer(dense)
    expected.load_state_dict(packed.state_dict(), strict=False)
    packed_y, dense_y = packed(x), expected(x)
    assert torch.equal(packed_y, dense_y)
    packed_y.square().sum().backward()
    dense_y.square().sum().backward()
    assert torch.equal(packed.sparse_low_rank_A["adapter0"].grad, expected.sparse_low_rank_A["adapter0"].grad)
    packed.merge(safe_merge=True)
    expected.merge(safe_merge=True)
    assert torch.equal(packed(x), expected(x))


def test_a_registered_layer_is_among_all_linear_layers() -> None:
    register_layout(HalvesLinear, HALVES)
    model = nn.ModuleDict({"packed": HalvesLinear(prune_(nn.Linear(6, 4)).weight.detach()), "dense": nn.Linear(4, 4)})
    model.forward = lambda x: model["dense"](model["packed"](x))
    with pytest.warns(UserWarning, match="Nothing is masked in 1 of the 2 modules"):
        peft_model = get_peft_model(model, SparseLoraConfig())
    assert isinstance(model["packed"], SparseLoraLinear)
    peft_model.unload()
    assert isinstance(model["packed"], HalvesLinear)


def test_a_name_belongs_to_one_layout() -> None:
    with pytest.raises(ValueError, match="A weight layout named 'linear' is already registered"):
        register_layout(HalvesLinear, WeightLayout("linear", *(HALVES.tensors,) * 6))


def test_on_top_of_a_lora_layer_both_count() -> None:
    base, x = make_base("linear")
    weight = base.weight
    model = get_peft_model(nn.Sequential(base), LoraConfig(target_modules=["0"], init_lora_weights=False))
    lora = model.base_model.model[0]
    layer = make_layer(lora)
    added_by_lora = lora(x) - base(x)
    torch.testing.assert_close(layer(x), reference(layer, x) + added_by_lora)
    assert layer.get_base_layer().weight is weight


def test_autocast_leaves_float64_alone_as_torch_does() -> None:
    base, x = make_base("linear")
    layer = make_layer(base)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert base(x).dtype == torch.float64
        assert torch.equal(layer(x), expected)
