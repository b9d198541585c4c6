"""Layouts that others published, read in one call."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from peft_variator.bases import CheckpointError, Sparse24Linear, load_base, pack_checkpoint, unpack_checkpoint
from peft_variator.bases.compressed_tensors import CODECS
from peft_variator.bases.config import translate_compressed_tensors
from peft_variator.bases.packing import LayoutError

from .models import contents, logits, tiny_bert, tiny_llama
from .reference import same_bits, two_four
from .vectors import entry, linear_weights, quantize, sparse_24, sparse_bitmask, write_model


def state_with(model, replaced: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The model's tensors, with the parameters named replaced by others."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in replaced}
    return state | {name: tensor for tensors in replaced.values() for name, tensor in tensors.items()}


def packed_count(model) -> int:
    return sum(isinstance(module, Sparse24Linear) for module in model.modules())


def load_checked(folder, auto_class=None, **kwargs):
    """`load_base`, and that no key was missing or unexpected and no file changed."""
    before = contents(folder)
    arguments = () if auto_class is None else (auto_class,)
    model, info = load_base(folder, *arguments, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    assert contents(folder) == before
    return model


def check_round_trip(model, folder, expected):
    """Saved, a foreign model is one of ours."""
    model.save_pretrained(folder)
    again = LlamaForCausalLM.from_pretrained(folder)
    assert packed_count(again) == packed_count(model)
    assert same_bits(logits(again), expected)


@pytest.mark.parametrize("flat_shape", [False, True])
@pytest.mark.parametrize("suffix", ["", ".weight"], ids=["new names", "old names"])
def test_sparse_24_bitmask(tmp_path, flat_shape, suffix):
    model = tiny_llama()
    packed = {f"{n}.weight": sparse_24(n + suffix, w, flat_shape) for n, w in linear_weights(model).items()}
    folder = write_model(tmp_path / "model", model, state_with(model, packed), entry("sparse-24-bitmask"))
    loaded = load_checked(folder)
    assert packed_count(loaded) == 14
    assert same_bits(logits(loaded), logits(model))
    check_round_trip(loaded, tmp_path / "again", logits(model))


@pytest.mark.parametrize("suffix", ["", ".weight"], ids=["new names", "old names"])
def test_sparse_bitmask_that_is_two_four_becomes_packed(tmp_path, suffix):
    model = tiny_llama()
    packed = {f"{n}.weight": sparse_bitmask(n + suffix, w) for n, w in linear_weights(model).items()}
    folder = write_model(tmp_path / "model", model, state_with(model, packed), entry("sparse-bitmask"))
    loaded = load_checked(folder)
    assert packed_count(loaded) == 14
    assert same_bits(logits(loaded), logits(model))
    check_round_trip(loaded, tmp_path / "again", logits(model))


def test_old_sparse_bitmask_holds_every_parameter_so(tmp_path):
    model = tiny_bert()
    model.bert.encoder.layer[0].output.dense.bias.data[::3] = 0
    state = {}
    for name, tensor in model.state_dict().items():
        state |= sparse_bitmask(name, tensor)
    config = {"sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}}
    folder = write_model(tmp_path / "model", model, state, None, compression_config=config)
    loaded = load_checked(folder, AutoModelForSequenceClassification)
    assert packed_count(loaded) == 13
    assert same_bits(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert "compression_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_unstructured_sparse_bitmask_becomes_dense(tmp_path):
    model = tiny_llama()
    for weight in linear_weights(model).values():
        weight.copy_(torch.randn_like(weight) * (torch.rand_like(weight) < 0.5))
    packed = {f"{n}.weight": sparse_bitmask(n, w) for n, w in linear_weights(model).items()}
    folder = write_model(tmp_path / "model", model, state_with(model, packed), entry("sparse-bitmask"))
    loaded = load_checked(folder)
    assert packed_count(loaded) == 0
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert same_bits(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert same_bits(logits(LlamaForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize(
    ("quantized", "format"), [(torch.float8_e4m3fn, "float-quantized"), (torch.int8, "int-quantized")]
)
@pytest.mark.parametrize("layout", ["sparse-24-bitmask", "sparse-bitmask", "dense"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_stacked_8_bit_layouts(tmp_path, strategy, quantized, format, layout, dtype):
    model = tiny_llama()
    stored, expected = {}, tiny_llama()
    for name, weight in linear_weights(model).items():
        values, scale, dense = quantize(weight, quantized, strategy)
        writers = {"sparse-24-bitmask": sparse_24, "sparse-bitmask": sparse_bitmask, "dense": None}
        write = writers[layout] or (lambda prefix, tensor: {f"{prefix}.weight": tensor})
        stored[f"{name}.weight"] = write(name, values) | {
            f"{name}.weight_scale": scale,
            f"{name}.weight_zero_point": torch.zeros(scale.shape, dtype=torch.int8),
            f"{name}.input_scale": torch.ones(1),
        }
        expected.get_submodule(name).weight.data = dense
    config = entry(layout, format)
    folder = write_model(tmp_path / "model", model, state_with(model, stored), config)
    loaded = load_checked(folder, dtype=dtype)
    assert packed_count(loaded) == 14
    for name, dense in linear_weights(expected).items():
        assert same_bits(loaded.get_submodule(name).unpack(), dense.masked_fill(dense == 0, 0.0).to(dtype))
    if dtype == torch.float32:
        assert same_bits(logits(loaded), logits(expected))
        check_round_trip(loaded, tmp_path / "again", logits(expected))
        unpack_checkpoint(folder, tmp_path / "dense")
        assert same_bits(logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), logits(expected))
        pack_checkpoint(folder, tmp_path / "packed")
        assert same_bits(logits(LlamaForCausalLM.from_pretrained(tmp_path / "packed")), logits(expected))


def test_a_module_that_is_quantized_and_not_sparse(tmp_path):
    model, expected = tiny_llama(), tiny_llama()
    weights = linear_weights(model)
    stored = {f"{n}.weight": sparse_24(n, w) for n, w in weights.items()}
    name = "model.layers.1.self_attn.o_proj"
    values, scale, dense = quantize(torch.randn(32, 32), torch.int8, "channel")
    stored[f"{name}.weight"] = {f"{name}.weight": values, f"{name}.weight_scale": scale}
    expected.get_submodule(name).weight.data = dense
    config = entry("sparse-24-bitmask", "int-quantized", ignore=("lm_head", name))
    loaded = load_checked(write_model(tmp_path / "model", model, state_with(model, stored), config))
    assert packed_count(loaded) == 13
    assert same_bits(logits(loaded), logits(expected))


@pytest.mark.parametrize("config", [None, entry("dense"), {"quant_method": "compressed-tensors"}])
def test_dense_with_zeros_is_packed_while_loading(tmp_path, config):
    model = tiny_llama()
    folder = write_model(tmp_path / "model", model, model.state_dict(), config)
    loaded = load_checked(folder, unpacked="always")
    assert packed_count(loaded) == 14
    assert loaded.model.layers[0].mlp.up_proj.unpacked == "always"
    assert same_bits(logits(loaded), logits(model))
    check_round_trip(loaded, tmp_path / "again", logits(model))


def test_one_of_ours_in_the_same_call(packed_dir):
    loaded = load_checked(packed_dir, unpacked="always")
    assert loaded.model.layers[0].mlp.up_proj.unpacked == "always"
    assert same_bits(logits(loaded), logits(tiny_llama()))


def test_offloaded_conversion(tmp_path):
    model = tiny_llama()
    packed = {f"{n}.weight": sparse_bitmask(n, w) for n, w in linear_weights(model).items()}
    folder = write_model(tmp_path / "model", model, state_with(model, packed), entry("sparse-bitmask"))
    loaded = load_checked(folder, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[0].mlp.up_proj.compressed.is_meta
    assert same_bits(logits(loaded), logits(model))


def test_a_dense_checkpoint_that_claims_two_four(tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[7, 4:8] = 1
    folder = write_model(tmp_path / "model", model, model.state_dict(), entry("dense"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight, row 7"):
        load_base(folder)
    folder = write_model(tmp_path / "other", model, model.state_dict(), None)
    assert packed_count(load_base(folder)) == 13


def test_a_packed_checkpoint_with_a_dense_weight_it_does_not_name(tmp_path):
    model = tiny_llama()
    weights = linear_weights(model, leave=("lm_head", "model.layers.0.mlp.up_proj"))
    state = state_with(model, {f"{n}.weight": sparse_24(n, w) for n, w in weights.items()})
    folder = write_model(tmp_path / "model", model, state, entry("sparse-24-bitmask"))
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight: the weight is dense, but"
    ):
        load_base(folder)


NAME = "model.layers.0.mlp.up_proj"


def damaged(tmp_path, change, writer=sparse_24):
    """A checkpoint with one layer's tensors changed."""
    model = tiny_llama()
    packed = {f"{n}.weight": writer(n, w) for n, w in linear_weights(model).items()}
    change(packed[f"{NAME}.weight"])
    layout = "sparse-24-bitmask" if writer is sparse_24 else "sparse-bitmask"
    return write_model(tmp_path / "model", model, state_with(model, packed), entry(layout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[f"{NAME}.bitmask"][3].fill_(0xFF), rf"{NAME}\.bitmask, row 3: columns 0 to 3 keep 4 weights"),
        (lambda p: p[f"{NAME}.bitmask"][5].fill_(0x11), rf"{NAME}\.bitmask, row 5: columns 0 to 3 keep 1 weights"),
        (lambda p: p.pop(f"{NAME}.bitmask"), rf"{NAME}\.bitmask is missing"),
        (lambda p: p.pop(f"{NAME}.compressed"), rf"{NAME}\.compressed is missing"),
        (lambda p: p.pop(f"{NAME}.shape"), rf"{NAME}\.shape is missing"),
        (lambda p: p.update({f"{NAME}.weight": torch.zeros(44, 32)}), "also stored dense"),
        (lambda p: p.update({f"{NAME}.shape": torch.tensor([44, 64])}), r"stores a weight of shape \(44, 64\), but"),
        (lambda p: p.update({f"{NAME}.compressed": torch.zeros(44, 8)}), rf"{NAME}\.compressed has shape \(44, 8\)"),
        (lambda p: p.update({f"{NAME}.bitmask": torch.zeros(44, 4)}), rf"{NAME}\.bitmask is torch\.float32"),
        (lambda p: p.update({f"{NAME}.weight_packed": torch.zeros(4)}), "4-bit and reordered layouts can't be read"),
        (
            lambda p: p.update({f"{NAME}.compressed": torch.zeros(44, 16, dtype=torch.int8)}),
            rf"{NAME}\.weight_scale is missing",
        ),
        (
            lambda p: p.update({f"{NAME}.weight_zero_point": torch.eye(44, 1, dtype=torch.int8).roll(2, 0)}),
            rf"{NAME}\.weight_zero_point, row 2: it is not 0",
        ),
    ],
)
def test_sparse_24_errors_name_file_tensor_and_row(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        load_base(damaged(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p[f"{NAME}.bitmask"][3].fill_(0xFF),
            rf"{NAME}\.bitmask, row 3: it keeps 32 weights, but row_offsets",
        ),
        (lambda p: p.pop(f"{NAME}.row_offsets"), rf"{NAME}\.row_offsets is missing"),
        (
            lambda p: p.update({f"{NAME}.row_offsets": torch.zeros(3)}),
            r"row_offsets has 3 entries, but the weight has 44",
        ),
        (
            lambda p: p.update({f"{NAME}.compressed": p[f"{NAME}.compressed"][:-1]}),
            rf"{NAME}\.bitmask, row 43: it keeps 16 weights, but row_offsets give it 15",
        ),
        (lambda p: p.update({f"{NAME}.shape": torch.tensor([44, 0])}), r"shape holds \[44, 0\]|shape \(44, 0\)"),
        (lambda p: p.update({f"{NAME}.bitmask": torch.zeros(4, 4)}), rf"{NAME}\.bitmask is torch\.float32 \(4, 4\)"),
    ],
)
def test_sparse_bitmask_errors_name_file_tensor_and_row(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*({message})"):
        load_base(damaged(tmp_path, change, sparse_bitmask))


def test_bits_past_the_end_of_a_sparse_bitmask():
    parts = {name[2:]: tensor for name, tensor in sparse_bitmask("m", two_four(3, 12)).items()}
    parts["bitmask"][2, 1] |= 0x80
    with pytest.raises(LayoutError, match=r"m\.bitmask, row 2: bits are set past the last column"):
        CODECS["sparse-bitmask"].check(parts, "m")
    with pytest.raises(LayoutError, match=r"m\.bitmask, row 2"):
        CODECS["sparse-bitmask"].decode_dense(parts, torch.float32, "m")


def test_a_scale_that_does_not_fit():
    parts = {name[2:]: tensor for name, tensor in sparse_24("m", two_four(4, 8)).items()}
    for shape in ((4,), (8, 1), (4, 3), (2, 2, 2)):
        parts["weight_scale"] = torch.ones(shape)
        with pytest.raises(LayoutError, match=r"m\.weight_scale has shape"):
            CODECS["sparse-24-bitmask"].decode_packed(parts, torch.float32, "m")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin-24"}},
    ],
)
def test_quantizations_that_can_not_be_read(config):
    with pytest.raises(ValueError, match="can't be read"):
        translate_compressed_tensors(config)


def test_a_weight_of_another_shape_than_the_model(tmp_path):
    model = tiny_llama()
    packed = {f"{n}.weight": sparse_24(n, w) for n, w in linear_weights(model).items()}
    folder = write_model(
        tmp_path / "model", model, state_with(model, packed), entry("sparse-24-bitmask"), intermediate_size=48
    )
    with pytest.raises(
        CheckpointError, match=r"stores a weight of shape \(32, 44\), but the model of config.json has \(32, 48\)"
    ):
        load_base(folder)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor_is_never_drawn(tmp_path, missing):
    model = tiny_llama()
    packed = {f"{n}.weight": sparse_24(n, w) for n, w in linear_weights(model).items()}
    packed[missing] = {}
    folder = write_model(tmp_path / "model", model, state_with(model, packed), entry("sparse-24-bitmask"))
    with pytest.raises(CheckpointError, match=rf"{missing} of LlamaForCausalLM missing"):
        load_base(folder)
