import io

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import SparseLoraLinear, attach_masks
from tests.tiny_models import tiny_model

from .cases import CASES, SMALL, outputs, prune_, random_masks, randomize_
from .test_layer import make_base, make_layer


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(function, layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), *(value.grad.clone() for value in layer.parameters() if value.requires_grad)]


@pytest.mark.parametrize("mask", ["weight", "stored"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv1d", "patches"])
def test_compiled_layers_agree_with_eager_ones(name: str, recompute: bool, mask: str) -> None:
    base, x = make_base(name)
    layer = make_layer(base, adapters=2, recompute=recompute, mask=mask)
    expected = step(layer, layer, x)
    found = step(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", ["weight", "stored"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "patches"])
def test_a_traced_layer_that_was_saved_and_loaded_agrees_with_the_eager_one(name: str, mask: str) -> None:
    base, x = make_base(name)
    layer = make_layer(base, adapters=2, mask=mask).eval()
    if mask == "stored":
        with pytest.raises(RuntimeError, match="Run one forward"):
            torch.jit.trace(layer, x, check_trace=False)
        layer(x)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x, check_trace=False), file)
    file.seek(0)
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(file)(other), layer(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_compiled_layer_keeps_no_effective_weight_either(recompute: bool) -> None:
    base = nn.Linear(40, 30)
    layer = make_layer(base, recompute=recompute)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    kept, known = [], base.weight.data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 30 * 40 and tensor.data_ptr() != known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(torch.randn(4, 40, requires_grad=True))
    assert len(kept) == (0 if recompute else 1)


def test_autocast_inside_a_compiled_graph() -> None:
    base, x = make_base("linear", torch.float32)
    layer = make_layer(base)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    expected = step(forward, layer, x)
    found = step(torch.compile(forward, backend="aot_eager", fullgraph=True), layer, x)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradient_checkpointing_inside_a_compiled_graph() -> None:
    base, x = make_base("linear")
    layer = make_layer(base)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    expected = step(layer, layer, x)
    found = step(torch.compile(forward, backend="aot_eager", fullgraph=True), layer, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_whole_model_in_one_graph() -> None:
    torch.manual_seed(0)
    base = prune_(tiny_model("llama", vocab_size=40, num_hidden_layers=1, **SMALL))
    model = randomize_(get_peft_model(base, SparseLoraConfig()))

    def gradients(forward) -> dict[str, torch.Tensor]:
        model.zero_grad()
        outputs(forward, CASES["llama"]).square().mean().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}

    expected = gradients(model)
    for name, gradient in gradients(torch.compile(model, backend="aot_eager", fullgraph=True)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-8)


def test_masks_that_nobody_checked_yet_are_checked_outside_of_the_graph() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    peft_model = get_peft_model(model, SparseLoraConfig(mask="stored", target_modules=["0"]))
    attach_masks(peft_model, random_masks(nn.Sequential(nn.Linear(6, 4)), ["0"]))
    layer = model[0]
    assert isinstance(layer, SparseLoraLinear)
    layer._checked.clear()  # as after transformers' load_adapter, which does not go through load_state_dict
    x = torch.randn(2, 6)
    assert torch.equal(torch.compile(peft_model, backend="aot_eager")(x), peft_model(x))
    assert layer._checked == {("default",)}
    model[0].get_base_layer().weight.data.neg_()
    layer._checked.clear()
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="was made for another base"):
        torch.compile(peft_model, backend="aot_eager")(x)
