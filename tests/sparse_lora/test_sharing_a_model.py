"""SparseLoRA on a model that has more than it: other adapters, tied weights, checkpoints that are repeated later."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import SparseLoraLayer, SparseLoraLinear
from tests.tiny_models import tiny_model

from .cases import CASES, build, outputs, randomize_


BERT = CASES["bert"]


def carrying(lora_targets: list[str], sparse_targets: list[str], lora_name: str = "task"):
    """A model with a task's LoRA that SparseLoRA comes on top of."""
    base = build("bert")
    base.add_adapter(LoraConfig(target_modules=lora_targets, r=2, init_lora_weights=False), adapter_name=lora_name)
    base.set_adapter(lora_name)
    with pytest.warns(UserWarning, match="Already found"):
        return randomize_(get_peft_model(base, SparseLoraConfig(target_modules=sparse_targets, r=2)))


@pytest.mark.parametrize("lora_name", ["task", "default"])
@pytest.mark.parametrize("sparse_targets", [["intermediate.dense"], ["query", "intermediate.dense"]], ids=str)
@pytest.mark.parametrize("call", ["merge_and_unload", "unload"])
def test_a_task_lora_that_the_base_carries_stays(call: str, sparse_targets: list[str], lora_name: str) -> None:
    model = carrying(["query"], sparse_targets, lora_name)
    model.base_model.set_adapter(["default", lora_name] if lora_name != "default" else "default")
    expected = outputs(model, BERT)
    with pytest.warns(UserWarning, match=r"still carries LoRA adapters on 2 modules.*zeros"):
        base = getattr(model, call)()
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2
    assert not any(layer.merged for layer in layers)
    assert not any(isinstance(module, SparseLoraLayer) for module in base.modules())
    assert list(base.peft_config) == [lora_name]
    assert isinstance(base.peft_config[lora_name], LoraConfig)
    if call == "merge_and_unload":
        torch.testing.assert_close(outputs(base, BERT), expected)
        weight = base.get_submodule("bert.encoder.layer.0.intermediate.dense").weight
        assert torch.equal(weight == 0, build("bert").bert.encoder.layer[0].intermediate.dense.weight == 0)


def test_merging_in_place_merges_its_own_layers_only() -> None:
    model = carrying(["query"], ["intermediate.dense"])
    expected = outputs(model, BERT)
    model.merge_adapter()
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    assert all(module.merged for module in model.modules() if isinstance(module, SparseLoraLayer))
    torch.testing.assert_close(outputs(model, BERT), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, BERT), expected)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_nothing_is_merged_if_the_last_layer_cannot_be(call: str) -> None:
    model = randomize_(get_peft_model(build("bert"), SparseLoraConfig()))
    layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
    layers[-1].sparse_low_rank_B["default"].data[0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, call)(safe_merge=True)
    assert not any(layer.merged for layer in layers)
    assert all(
        torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items()
    )


@pytest.mark.filterwarnings("ignore:.*tied", "ignore:Nothing is masked")
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_another_module_has_too_is_not_merged(call: str) -> None:
    base = tiny_model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    embeddings = base.model.embed_tokens.weight.detach().clone()
    model = randomize_(get_peft_model(base, SparseLoraConfig(target_modules=["q_proj", "lm_head"])))
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight .*embed_tokens"):
        getattr(model, call)()
    assert torch.equal(base.model.embed_tokens.weight, embeddings)
    assert not any(module.merged for module in base.modules() if isinstance(module, SparseLoraLayer))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_checkpoint_that_is_repeated_after_a_switch_raises(name: str, use_reentrant: bool) -> None:
    case = CASES[name]
    config = SparseLoraConfig(r=2, init_lora_weights=False, **case.targets)
    model = get_peft_model(build(name), config)
    model.add_adapter("second", SparseLoraConfig(r=2, init_lora_weights=False, **case.targets))
    model.train()
    if name == "llama":
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs(model, case).square().mean().backward()
    loss = outputs(model, case).square().mean()
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"repeated in the backward|Recomputed values"):
        loss.backward()
    outputs(model, case).square().mean().backward()
    layers = [module for module in model.modules() if isinstance(module, SparseLoraLayer)]
    assert all(layer.sparse_low_rank_B["second"].grad is not None for layer in layers)


def scaled_layer() -> SparseLoraLinear:
    torch.manual_seed(0)
    layer = SparseLoraLinear(nn.Linear(6, 4).requires_grad_(False), "module")
    for name in ("one", "two"):
        layer.update_layer(name, SparseLoraConfig(init_lora_weights=False), rank=2, alpha=3)
    layer.set_adapter(["one"])
    return layer


def test_the_update_can_be_scaled_as_with_lora() -> None:
    layer = scaled_layer()
    x, delta = torch.randn(3, 6), layer.get_delta_weight("one")
    base = layer.get_base_layer()
    layer.scale_layer(2)
    torch.testing.assert_close(layer(x), base(x) + 2 * x @ delta.t())
    layer.scale_layer(3)
    assert layer.scaling == {"one": 9.0, "two": 1.5}
    layer.unscale_layer(2)
    assert layer.scaling["one"] == 4.5
    layer.unscale_layer()
    assert layer.scaling["one"] == 1.5
    layer.set_scale("two", 0.5)
    layer.set_scale("nobody", 7)
    assert layer.scaling == {"one": 1.5, "two": 0.75}


def test_scaling_while_merged_does_not_spoil_what_comes_back() -> None:
    layer = scaled_layer()
    weight = layer.get_base_layer().weight.clone()
    layer.merge()
    layer.scale_layer(10)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, weight)


class Int8Weight(torch.Tensor):
    """A weight that calls itself float32 and is not, as torchao's are."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "Int8Weight":
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Int8Weight(tensors["values"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} is not implemented for Int8Weight")


def test_weights_that_only_look_like_floating_point_are_refused_by_name() -> None:
    base = nn.Linear(4, 4)
    base.weight = nn.Parameter(Int8Weight(torch.zeros(4, 4, dtype=torch.int8)), requires_grad=False)
    with pytest.raises(TypeError, match=r"'module' of type Linear with a weight of type Int8Weight.*not quantized"):
        SparseLoraLinear(base, "module")
