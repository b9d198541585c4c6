"""Counted FLOPs against formulas written out by hand."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import grouped_mm, scaled_dot_product_attention
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from peft_variator import VariatorConfig
from peft_variator.profiling import count_flops


class Call(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, **inputs):
        return self.function(**inputs)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


OPERATIONS = {
    "linear": (nn.functional.linear, {"input": ones(3, 5, 7), "weight": ones(11, 7)}, 2 * 15 * 7 * 11),
    "matmul": (torch.matmul, {"input": ones(4, 3, 5), "other": ones(4, 5, 2)}, 2 * 4 * 3 * 5 * 2),
    "mv": (torch.mv, {"input": ones(3, 5), "vec": ones(5)}, 2 * 15),
    "addmm_": (
        lambda **inputs: torch.zeros(3, 11).addmm_(**inputs),
        {"mat1": ones(3, 7), "mat2": ones(7, 11)},
        2 * 3 * 7 * 11,
    ),
    "addmv": (torch.addmv, {"input": ones(3), "mat": ones(3, 5), "vec": ones(5)}, 2 * 15),
    "dot": (torch.dot, {"input": ones(5), "tensor": ones(5)}, 2 * 5),
    "conv2d": (
        torch.conv2d,
        {"input": ones(2, 3, 8, 8), "weight": ones(4, 3, 2, 2), "stride": 2},
        2 * 2 * 4 * 16 * 12,
    ),
    "elementwise": (torch.add, {"input": ones(9), "other": ones(9)}, 0),
    "interpolation": (
        nn.functional.interpolate,
        {"input": ones(1, 1, 4, 4), "scale_factor": 2, "mode": "bilinear"},
        0,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation(name):
    function, inputs, expected = OPERATIONS[name]
    assert count_flops(Call(function), inputs) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "causal", "tensor"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_on_cpu_is_counted(dtype, mask, key_heads):
    """2 products of (length, head_dim, keys) in each of the query's heads, whatever the mask."""
    inputs = {
        "query": ones(2, 4, 6, 8, dtype=dtype),
        "key": ones(2, key_heads, 6, 8, dtype=dtype),
        "value": ones(2, key_heads, 6, 8, dtype=dtype),
        "is_causal": mask == "causal",
        "enable_gqa": key_heads != 4,
        "attn_mask": ones(2, 1, 6, 6, dtype=torch.bool) if mask == "tensor" else None,
    }
    assert count_flops(Call(scaled_dot_product_attention), inputs) == 2 * 2 * (2 * 4) * 6 * 6 * 8


def test_experts_are_counted():
    inputs = {
        "mat_a": ones(32, 16, dtype=torch.bfloat16),
        "mat_b": ones(4, 16, 8, dtype=torch.bfloat16),
        "offs": torch.tensor([8, 16, 24, 32], dtype=torch.int32),
    }
    assert count_flops(Call(grouped_mm), inputs) == 2 * 32 * 16 * 8


def linear(tokens, inner, outer):
    return 2 * tokens * inner * outer


def test_bert():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, vocab_size=31
    )
    batch, length = 2, 7
    tokens = batch * length
    layer = 4 * linear(tokens, 16, 16) + 2 * linear(tokens, 16, 40) + 2 * 2 * batch * length * length * 16
    inputs = {"input_ids": torch.ones(batch, length, dtype=torch.long)}
    assert count_flops(BertModel(config).eval(), inputs) == 3 * layer + linear(batch, 16, 16)


def test_llama_prefill():
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=31,
    )
    batch, length = 2, 5
    tokens = batch * length
    projections = 2 * linear(tokens, 16, 16) + 2 * linear(tokens, 16, 8)
    layer = projections + 3 * linear(tokens, 16, 24) + 2 * 2 * batch * length * length * 16
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.ones(batch, length, dtype=torch.long), "logits_to_keep": 1}
    assert count_flops(model, inputs) == 2 * layer + linear(batch, 16, 31)


def test_vit():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=8,
        patch_size=4,
        num_channels=3,
    )
    tokens = 4 + 1
    layer = 4 * linear(tokens, 16, 16) + 2 * linear(tokens, 16, 40) + 2 * 2 * tokens * tokens * 16
    patches = linear(4, 3 * 4 * 4, 16)
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8)}
    assert count_flops(ViTModel(config, add_pooling_layer=False).eval(), inputs) == layer + patches


def test_what_is_built_once_is_not_counted():
    built = []

    def lazy(x):
        if not built:
            built.append(x @ x)
        return x @ built[0]

    assert count_flops(Call(lazy), {"x": ones(3, 3)}) == 2 * 27


def test_no_gradient_is_recorded_and_the_mode_stays():
    model = nn.Sequential(nn.Linear(3, 3))
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert count_flops(model.train(), {"input": ones(1, 3)}) == 18
    assert model.training
    assert not any(output.requires_grad for output in outputs)


def test_a_product_without_a_formula_is_refused():
    inputs = {"input": ones(3, 5), "vec1": ones(3), "vec2": ones(5)}
    with pytest.raises(ValueError, match="No FLOP formula is known for aten.addr, so Call would seem cheaper"):
        count_flops(Call(torch.addr), inputs)


def test_layers_of_torch_that_run_as_one_operator_are_counted():
    """In evaluation mode, where they may, as in training mode."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    inputs = {"src": ones(2, 8, 16)}
    # Per token: four maps of 16 × 16 and two of 16 × 32, and scores and values over 8 tokens.
    expected = 2 * 2 * 8 * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_flops(layer.train(), inputs) == count_flops(layer.eval(), inputs) == expected
    assert torch.backends.mha.get_fastpath_enabled()
    bilinear = torch.nn.Bilinear(3, 3, 2)
    with pytest.raises(ValueError, match="trilinear"):
        count_flops(bilinear, {"input1": ones(2, 3), "input2": ones(2, 3)})


PACKED = {
    "_int_mm": (ones(32, 16, dtype=torch.int8), ones(16, 8, dtype=torch.int8)),
    "_weight_int8pack_mm": (
        ones(32, 16, dtype=torch.bfloat16),
        ones(8, 16, dtype=torch.int8),
        ones(8, dtype=torch.bfloat16),
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_products_in_int8_are_counted(name):
    inputs = {f"input_{place}": value for place, value in enumerate(PACKED[name])}
    product = Call(lambda **inputs: getattr(torch.ops.aten, name)(*inputs.values()))
    assert count_flops(product, inputs) == 2 * 32 * 16 * 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_a_quantised_model_has_the_flops_of_the_one_in_floating_point(dtype):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=31
    )
    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    plugin = get_peft_model(BertModel(config), VariatorConfig(correction_dim=8))
    for model in (BertModel(config).eval(), plugin.eval()):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=dtype)
        assert count_flops(quantized, inputs) == count_flops(model, inputs)


def test_counting_works_inside_inference_mode():
    with torch.inference_mode():
        assert count_flops(nn.Linear(3, 5), {"input": ones(2, 3)}) == 60


def test_padding_changes_what_a_plugin_saves_and_not_what_is_counted():
    """The groups of a padded batch go another way through the plugin: its products count there, too."""
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    model = get_peft_model(BertModel(config, add_pooling_layer=False), VariatorConfig(bottleneck_dim=4)).eval()
    ids = ones(2, 10, dtype=torch.long)
    mask = ones(2, 10, dtype=torch.long)
    mask[0, 4:] = 0
    attention = 4 * (2 * 20 * 16 * 16) + 2 * (2 * 2 * 2 * 10 * 10 * 8)
    # [CLS], one merged, [SEP] of four tokens; [CLS], two merged, [SEP] of ten.
    rows = 3 + 4
    plugin = 2 * 20 * 16 * (1 + 4) + 2 * rows * 16 * 4 + 2 * 20 * 4 * 16
    expected = attention + 2 * (2 * rows * 16 * 32) + plugin
    assert count_flops(model, {"input_ids": ids, "attention_mask": mask}) == expected
