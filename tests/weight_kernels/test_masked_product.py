"""x·((W + B·A) ⊙ M)ᵀ of a few tokens, without the weight in memory: on every instruction set, and through a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_variator import SparseLoraConfig, attach_masks
from peft_variator.bases import Sparse24Linear
from peft_variator.bases.packing import pack
from peft_variator.bitmask import pack_mask
from peft_variator.tuners.sparse_lora import SparseLoraLinear
from peft_variator.weight_kernels import product
from peft_variator.weight_kernels.compiled import LEVELS
from peft_variator.weight_kernels.product import MAX_TOKENS, FewTokensWeight, multiply
from tests.bases.reference import two_four

from .levels import needs_product


DTYPES = [torch.bfloat16, torch.float32]
FORMS = ["packed", "packed under another mask", "dense", "dense under a mask"]
ROWS, COLUMNS = 512, 1024


def drawn(form: str, rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[FewTokensWeight, Tensor, Tensor]:
    """What is stored, W, and M, of which one row is empty where that can be."""
    empty = torch.arange(rows)[:, None] == rows // 3
    if form.startswith("packed"):
        weight = two_four(rows, columns, dtype, seed=int(torch.randint(1 << 30, ())))
        packed = pack(weight)
        stored = FewTokensWeight(packed.compressed, packed.bitmask)
    else:
        weight = (torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.5)).to(dtype).masked_fill(empty, 0)
        stored = FewTokensWeight(weight, None)
    kept = (torch.rand(rows, columns) < 0.6) & ~empty if "mask" in form else weight != 0
    stored = stored._replace(kept=pack_mask(kept) if "mask" in form else None)
    return stored._replace(a=torch.randn(rank, columns), b=torch.randn(rows, rank)), weight, kept


def check_product(
    stored: FewTokensWeight, weight: Tensor, kept: Tensor, tokens: int, biased: bool, level: int
) -> None:
    """The product of random tokens, and of a random bias, is that of the weight made in double precision."""
    assert stored.a is not None
    assert stored.b is not None
    (rows, columns), dtype = weight.shape, weight.dtype
    bias = torch.randn(rows).to(dtype) if biased else None
    x = torch.randn(tokens, columns).to(dtype)
    found = multiply(x, bias, stored, level)
    double, offset = weight.double(), None if bias is None else bias.double()
    exact = F.linear(x.double(), (double + stored.b.double() @ stored.a.double()) * kept, offset)
    largest = (double.abs() + stored.b.double().abs() @ stored.a.double().abs()) * kept
    scale = F.linear(x.double().abs(), largest, None if offset is None else offset.abs())
    allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * scale
    assert found.dtype == dtype
    assert (found.double() - exact).abs().le(allowed).all(), (rows, columns, tokens, len(stored.a), biased)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_the_weight_made_in_double_precision(form: str, dtype: torch.dtype, level: int) -> None:
    needs_product(level)
    print("seed", torch.seed())
    sizes = [(1, 4), (3, 12), (5, 36), (9, 64), (17, 100), (8, 260)]
    sizes += [] if form.startswith("packed") else [(1, 1), (7, 3), (4, 9), (9, 31), (10, 47), (6, 133)]
    for rows, columns in sizes:
        for tokens, rank, biased in ((1, 8, True), (1, 1, False), (2, 33, True), (6, 5, True), (16, 17, False)):
            check_product(*drawn(form, rows, columns, rank, dtype), tokens, biased, level)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_agrees_for_every_number_of_tokens_and_several_threads(form: str, level: int) -> None:
    """Rows that the threads share unevenly, and more of them than are worked on at once."""
    needs_product(level)
    print("seed", torch.seed())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        drawn_once = drawn(form, 1000, 148, 19, torch.bfloat16)
        for tokens in range(1, MAX_TOKENS + 1):
            check_product(*drawn_once, tokens, tokens % 2 == 0, level)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_reaches_its_own_rows_alone(form: str, level: int) -> None:
    needs_product(level)
    stored, _, kept = drawn(form, 9, 40, 3, torch.float32)
    assert stored.a is not None
    assert stored.b is not None
    stored.b[4, 1] = torch.nan
    x = torch.randn(1, 40)
    found = multiply(x, None, stored, level)[0]
    assert found.isnan().tolist() == [row == 4 for row in range(9)]
    stored.b.zero_()
    stored.a[:, 17] = torch.inf  # times 0 is NaN, where it is kept
    assert torch.equal(multiply(x, None, stored, level)[0].isnan(), kept[:, 17])


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have it chosen without being measured; one entry a call."""
    needs_product()
    calls: list[str] = []

    def choose(key: object, ways: dict[str, Callable[[], object]], device: torch.device) -> str:
        calls.append("few tokens")
        return "few tokens"

    monkeypatch.setattr(product, "fastest", choose)
    return calls


class Model(nn.Module):
    """One layer to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(…, COLUMNS) -> (…, ROWS)."""
        return self.layer(x)


def adapted(packed: bool, dtype: torch.dtype = torch.bfloat16, mask: str = "weight") -> PeftModel:
    """A model with a random SparseLoRA adapter named "default"."""
    linear = nn.Linear(COLUMNS, ROWS, dtype=dtype)
    pruned = two_four(ROWS, COLUMNS, dtype)
    kept = pruned != 0
    with torch.no_grad():
        if mask == "weight":
            linear.weight.copy_(pruned)
        model = Model(Sparse24Linear.from_dense(linear) if packed else linear)
    config = SparseLoraConfig(r=4, target_modules=["layer"], init_lora_weights=False, mask=mask)
    peft_model = get_peft_model(model, config)
    if mask == "stored":
        attach_masks(peft_model, {"layer": kept})
    return peft_model.eval()


def layer_of(model: PeftModel) -> SparseLoraLinear:
    layer = model.get_base_model().layer
    assert isinstance(layer, SparseLoraLinear)
    return layer


def expected(model: PeftModel, x: Tensor) -> Tensor:
    """The plainest statement, in double precision."""
    layer = layer_of(model)
    base = layer.get_base_layer()
    weight = (base.unpack() if isinstance(base, Sparse24Linear) else base.weight.detach()).double()
    update = torch.zeros_like(weight)
    for name in layer.active_adapters:
        a, b = layer.sparse_low_rank_A[name].detach(), layer.sparse_low_rank_B[name].detach()
        update += layer.scaling[name] * b.double() @ a.double()
    effective = (weight + update) * layer.get_mask(layer.active_adapters[0])
    return F.linear(x.double(), effective, base.bias.detach().double())


def check(model: PeftModel, chosen: list[str], x: Tensor | None = None) -> Tensor:
    """The output is that of the parameters as they are now, and came by the product."""
    x = torch.randn(1, COLUMNS).to(layer_of(model).get_base_layer().bias.dtype) if x is None else x
    before = len(chosen)
    found = model(x)
    assert len(chosen) == before + 1
    exact = expected(model, x)
    assert (found.double() - exact).abs().max() <= max(2 * torch.finfo(found.dtype).eps, 1e-5) * exact.abs().max()
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_follows_every_change_of_its_parameters(packed: bool, dtype: torch.dtype, chosen: list[str]) -> None:
    model = adapted(packed, dtype)
    layer = layer_of(model)
    a, b = layer.sparse_low_rank_A["default"], layer.sparse_low_rank_B["default"]

    def step() -> None:
        optimizer = torch.optim.SGD([a, b], lr=1.0)
        model(torch.randn(3, COLUMNS).to(dtype)).float().square().mean().backward()
        optimizer.step()

    def load() -> None:
        state = {
            name: torch.randn_like(value) for name, value in model.state_dict().items() if "sparse_low_rank" in name
        }
        model.load_state_dict(state, strict=False)

    def write() -> None:
        base = layer.get_base_layer()
        if isinstance(base, Sparse24Linear):
            base.write(base.unpack() * 3)
        else:
            base.weight.mul_(3)

    def to_other_dtype() -> None:
        model.to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)

    check(model, chosen)
    step()
    check(model, chosen)
    with torch.no_grad():
        for change in (
            lambda: a.mul_(2),
            lambda: b.data.add_(1),
            lambda: setattr(b, "data", torch.randn_like(b)),
            lambda: a.set_(torch.randn_like(a)),
            load,
            lambda: layer.set_scale("default", 0.5),
            lambda: layer.scale_layer(3.0),
            write,
            to_other_dtype,
        ):
            before = model(torch.ones(1, COLUMNS).to(layer.get_base_layer().bias.dtype))
            change()
            check(model, chosen)
            after = model(torch.ones(1, COLUMNS).to(layer.get_base_layer().bias.dtype))
            assert change is to_other_dtype or not torch.allclose(before.float(), after.float(), rtol=1e-2)


def test_adapters_are_switched_added_and_taken_off(chosen: list[str]) -> None:
    model = adapted(packed=True)
    model.add_adapter("other", SparseLoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(1, COLUMNS).bfloat16()
    with torch.inference_mode():
        first = check(model, chosen, x)
        model.set_adapter("other")
        second = check(model, chosen, x)
        model.base_model.set_adapter(["default", "other"])
        both = check(model, chosen, x)
        with model.disable_adapter():
            base = model(x)
        assert torch.equal(base, layer_of(model).get_base_layer()(x))
        outputs = [first, second, both, base]
        assert not any(torch.equal(one, other) for one in outputs for other in outputs if one is not other)
        model.set_adapter("default")
        assert torch.equal(check(model, chosen, x), first)
        model.merge_adapter()
        assert (model(x) - first).abs().max() <= 0.02 * first.abs().max()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_an_adapter_that_is_loaded_is_used(packed: bool, chosen: list[str], tmp_path) -> None:
    model = adapted(packed)
    x = torch.randn(1, COLUMNS).bfloat16()
    with torch.no_grad():
        saved = check(model, chosen, x)
        model.save_pretrained(tmp_path)
        layer_of(model).sparse_low_rank_A["default"].normal_()
        assert not torch.equal(check(model, chosen, x), saved)
        model.load_adapter(tmp_path, "default")
        assert torch.equal(check(model, chosen, x), saved)


def test_a_stored_mask_is_the_one_that_counts(chosen: list[str]) -> None:
    model = adapted(packed=False, mask="stored")
    assert layer_of(model).get_mask("default").float().mean() == 0.5
    with torch.no_grad():
        check(model, chosen)


def test_gradients_are_those_of_the_weight_that_is_made(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(packed=True, dtype=torch.float32)
    layer = layer_of(model)
    x, given = torch.randn(2, COLUMNS, requires_grad=True), torch.randn(2, ROWS)
    wanted = [x, layer.sparse_low_rank_A["default"], layer.sparse_low_rank_B["default"]]
    found = torch.autograd.grad(model(x), wanted, given)
    assert chosen
    monkeypatch.setattr(product, "fastest", lambda key, ways, device: next(iter(ways)))
    for one, other in zip(found, torch.autograd.grad(model(x), wanted, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_threads_share_a_layer(chosen: list[str]) -> None:
    model = adapted(packed=True)
    inputs = [torch.randn(1, COLUMNS).bfloat16() for _ in range(4)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
    found: dict[int, bool] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = all(torch.equal(model(inputs[index]), wanted[index]) for _ in range(10))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(len(inputs)), True)


def test_many_tokens_and_other_precisions_make_the_weight(chosen: list[str]) -> None:
    model = adapted(packed=True)
    with torch.no_grad():
        model(torch.randn(17, COLUMNS).bfloat16())
        model.to(torch.float16)(torch.randn(1, COLUMNS).half())
    assert not chosen
