"""Merging on files gives what merging in memory gives, bit for bit, from every form of a base to every form."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from peft_variator import SparseLoraConfig, load_base
from peft_variator.bases import CheckpointError, Sparse24Linear, merge_checkpoint, pack_checkpoint
from peft_variator.sparsity import PruningConfig, prune
from tests.tiny_models import tiny_model

from .adapters import dense_state, merged_in_memory, save_adapter
from .models import contents, logits, make_two_four, tiny_bert, tiny_llama, tiny_t5
from .reference import prune_two_four, same_bits, two_four
from .vectors import entry, linear_weights, quantize, sparse_24, sparse_bitmask, write_model


SETTINGS = {
    "plain": SparseLoraConfig(r=4, lora_alpha=6),
    "patterns": SparseLoraConfig(
        r=4, rank_pattern={"up_proj": 2, "q_proj": 7}, alpha_pattern={"down_proj": 3, "v_proj": 5}, use_rslora=True
    ),
    "some modules": SparseLoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "a new head": SparseLoraConfig(r=2, modules_to_save=["lm_head"]),
}


def assert_same(actual: nn.Module, wanted: nn.Module) -> None:
    """All parameters are equal bit for bit."""
    one, other = dense_state(actual), dense_state(wanted)
    assert one.keys() == other.keys()
    assert [name for name in one if not same_bits(one[name], other[name])] == []


def packed_layers(model: nn.Module) -> int:
    return sum(isinstance(module, Sparse24Linear) for module in model.modules())


FORMS = {"same": None, "packed": True, "dense": False}


@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize(
    ("form", "config"),
    [
        # Settings change what is added to a weight, and forms how it is written: all pairs are slow.
        pytest.param(
            form,
            config,
            id=f"{form_name}-{name}",
            marks=[pytest.mark.slow] * (name != "plain" and form is not None),
        )
        for form_name, form in FORMS.items()
        for name, config in SETTINGS.items()
    ],
)
def test_as_in_memory(dense_source, packed_source, tmp_path, base, form, config):
    source = {"dense": dense_source, "packed": packed_source}[base]
    adapter = save_adapter(tiny_llama(), config, tmp_path / "adapter")
    before = contents(source), contents(adapter)
    wanted = merged_in_memory(AutoModelForCausalLM.from_pretrained(source), adapter)
    report = merge_checkpoint(source, adapter, tmp_path / "merged", form)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(merged, wanted)
    assert not same_bits(logits(merged), logits(tiny_llama()))
    becomes_packed = form if form is not None else base == "packed"
    assert packed_layers(merged) == report.packed == (14 if becomes_packed else 0)
    assert report.merged == (2 if config.layers_to_transform else 14)
    assert report.replaced == (1 if config.modules_to_save else 0)
    settings = (tmp_path / "merged" / "config.json").read_text()
    assert ("sparsity" in settings) == ("quantization_config" in settings) == becomes_packed
    assert (contents(source), contents(adapter)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [True, False])
def test_low_precision_is_rounded_once(tmp_path, dtype, packed):
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, SETTINGS["plain"], tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(merged, merged_in_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter))
    stored, name = load_file(adapter / "adapter_model.safetensors"), "model.layers.0.mlp.up_proj"
    part = {kind: stored[f"base_model.model.{name}.sparse_low_rank_{kind}"] for kind in "AB"}
    weight = model.get_submodule(name).weight.double()
    exact = torch.where(weight != 0, weight + 6 / 4 * part["B"].double() @ part["A"].double(), 0.0)
    result = dense_state(merged)[f"{name}.weight"].double()
    # half a unit in the last place, and the error of the sum in float32
    assert ((result - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


@pytest.mark.parametrize("packed", [True, False])
def test_several_files(tmp_path, packed):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    adapter = save_adapter(tiny_llama(), SETTINGS["a new head"], tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed)
    notice = {"README.md"} if packed else set()
    assert contents(tmp_path / "merged").keys() == contents(tmp_path / "base").keys() | notice
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(merged, merged_in_memory(tiny_llama(), adapter))


@pytest.mark.parametrize("packed", [True, False])
def test_zeros_are_those_of_the_mask_and_positive(dense_dir, tmp_path, packed):
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data[layer.weight == 0] = -0.0
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, SETTINGS["plain"], tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed)
    state = dense_state(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    for name, weight in linear_weights(model).items():
        merged = state[f"{name}.weight"]
        assert torch.equal(merged == 0, weight == 0)
        assert not merged[merged == 0].signbit().any()


def test_kept_zeros_of_a_packed_base_are_learned(packed_source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_source)
    model.model.layers[0].mlp.up_proj.compressed.data[0] = 0
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, SETTINGS["plain"], tmp_path / "adapter")
    for packed in (True, False):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / f"merged-{packed}", packed)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{packed}")
        assert_same(merged, merged_in_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter))
        row = dense_state(merged)["model.layers.0.mlp.up_proj.weight"][0]
        assert row.count_nonzero() == len(row) / 2


@pytest.fixture(params=["2:4", "unstructured"])
def stored_masks(request, tmp_path):
    """A dense base, an adapter that stores its masks, and their pattern; one module keeps everything."""
    torch.manual_seed(1)
    model = type(tiny_llama())(tiny_llama().config)
    model.save_pretrained(tmp_path / "base")
    pruned = {"pattern": "2:4"} if request.param == "2:4" else {"sparsity": 0.4}
    masks = prune(model, PruningConfig(method="magnitude", keep_dense=True, **pruned)).masks
    del masks["model.layers.1.mlp.up_proj"]
    adapter = save_adapter(model, SparseLoraConfig(r=4, mask="stored"), tmp_path / "adapter", masks)
    return model, adapter, request.param


@pytest.mark.filterwarnings("ignore:Nothing is masked")
def test_stored_masks(stored_masks, tmp_path):
    model, adapter, pattern = stored_masks
    wanted = merged_in_memory(model, adapter)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "dense")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_same(merged, wanted)
    if pattern == "2:4":
        assert merge_checkpoint(tmp_path / "base", adapter, tmp_path / "packed", packed=True).packed == 13
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        assert packed_layers(merged) == 13
        assert_same(merged, wanted)
        return
    with pytest.raises(ValueError, match=r"sparse_low_rank_mask, row \d+: columns \d+ to \d+ have [34] non-zero.*"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "packed", packed=True)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("packed", [True, False])
def test_biases_and_heads_of_an_encoder(tmp_path, bias, packed):
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    config = SparseLoraConfig(r=3, bias=bias, modules_to_save=["classifier"], task_type="SEQ_CLS")
    adapter = save_adapter(model, config, tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed)
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_same(merged, merged_in_memory(model, adapter))
    assert not torch.equal(merged.bert.pooler.dense.bias, tiny_bert().bert.pooler.dense.bias)
    assert report.replaced == (2 + 13 + (5 if bias == "all" else 0))


def test_a_base_that_was_saved_with_a_head_which_the_adapter_knows_nothing_of(tmp_path):
    make_two_four(BertForMaskedLM(tiny_bert().config), leave=("cls.predictions.decoder",)).save_pretrained(
        tmp_path / "base"
    )
    encoder = BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    adapter = save_adapter(encoder, SparseLoraConfig(r=3), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    wanted = merged_in_memory(encoder, adapter)
    assert_same(BertModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False), wanted)
    assert_same(BertForMaskedLM.from_pretrained(tmp_path / "merged").bert, wanted)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = tiny_model("gpt2")
    for seed, module in enumerate(model.modules()):
        if isinstance(module, Conv1D):
            module.weight.data = prune_two_four(module.weight.data.t().contiguous(), seed).t().contiguous()
    return model.eval()


@pytest.mark.parametrize("names", ["transformer.h", "h"])
def test_conv1d_and_older_names(tmp_path, names):
    model = tiny_gpt2()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    state = {name.replace("transformer.h", names): tensor for name, tensor in state.items()}
    write_model(tmp_path / "base", model, state, None)
    adapter = save_adapter(model, SparseLoraConfig(r=3), tmp_path / "adapter")
    report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    assert report.merged == 8
    wanted = merged_in_memory(model, adapter)
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), wanted)


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = make_two_four(ViTForImageClassification(config), leave=("classifier",))
    kernel = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight
    kernel.data[kernel.abs() < 0.02] = 0
    model.save_pretrained(tmp_path / "base")
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    adapter = save_adapter(model, SparseLoraConfig(r=3, target_modules=linears), tmp_path / "adapter")
    wanted = merged_in_memory(model, adapter)
    for packed in (True, False):
        report = merge_checkpoint(tmp_path / "base", adapter, tmp_path / f"merged-{packed}", packed)
        assert report.merged == len(linears)
        assert report.packed == (len(linears) - 2 if packed else 0)
        assert_same(ViTForImageClassification.from_pretrained(tmp_path / f"merged-{packed}"), wanted)


@pytest.mark.parametrize("packed", [True, False])
def test_tied_weights(tmp_path, packed):
    tied = tiny_llama(tie=True)
    tied.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tied, SETTINGS["plain"], tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_same(merged, merged_in_memory(tied, adapter))


@pytest.mark.filterwarnings("ignore:.*tied")
def test_an_adapted_head_that_is_tied_is_not_merged_in_memory(tmp_path):
    tied = tiny_llama(tie=True)
    adapter = save_adapter(tied, SparseLoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lm_head.*embed_tokens.*tie_word_embeddings=False"):
        merged_in_memory(tied, adapter)


@pytest.mark.filterwarnings("ignore:.*tied")
@pytest.mark.parametrize("packed", [True, False])
def test_an_adapted_head_that_is_tied_is_refused(tmp_path, packed):
    tiny_llama(tie=True).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tiny_llama(), SparseLoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="lm_head"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed)
    assert not (tmp_path / "merged").exists()


def test_an_encoder_and_a_decoder(tmp_path):
    model = tiny_t5()
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, SparseLoraConfig(r=3), tmp_path / "adapter")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed=True)
    merged = T5ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert_same(merged, merged_in_memory(T5ForConditionalGeneration.from_pretrained(tmp_path / "base"), adapter))


EIGHT_BITS = {"int8": (torch.int8, "int-quantized"), "fp8": (torch.float8_e4m3fn, "float-quantized")}


def published(layout: str, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a model in a layout of others, and its entry of config.json."""
    state, kind = dict(model.state_dict()), layout.removesuffix(" old")
    for name, weight in linear_weights(model).items():
        del state[f"{name}.weight"]
        if kind == "sparse-bitmask":
            state |= sparse_bitmask(f"{name}.weight" if layout.endswith("old") else name, weight)
        elif kind == "sparse-24-bitmask":
            state |= sparse_24(f"{name}.weight" if layout.endswith("old") else name, weight, flat_shape=True)
        else:
            values, scale, _ = quantize(weight, EIGHT_BITS[kind][0], "channel")
            state |= {f"{name}.weight_scale": scale, **sparse_24(name, values)}
    if kind in EIGHT_BITS:
        return state, entry("sparse-24-bitmask", EIGHT_BITS[kind][1])
    return state, entry(kind)


@pytest.mark.parametrize(
    "form",
    [None, pytest.param(True, marks=pytest.mark.slow), False],  # the same form is the packed one
    ids=["same", "packed", "dense"],
)
@pytest.mark.parametrize(
    "layout", ["sparse-24-bitmask", "sparse-24-bitmask old", "sparse-bitmask", "sparse-bitmask old", *EIGHT_BITS]
)
def test_bases_that_others_published(tmp_path, layout, form):
    model = tiny_llama()
    folder = write_model(tmp_path / "base", model, *published(layout, model))
    adapter = save_adapter(model, SETTINGS["plain"], tmp_path / "adapter")
    wanted = merged_in_memory(load_base(folder), adapter)
    before = contents(folder)
    merge_checkpoint(folder, adapter, tmp_path / "merged", form)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert packed_layers(merged) == (0 if form is False else 14)
    assert_same(merged, wanted)
    assert ("compressed-tensors" in (tmp_path / "merged" / "config.json").read_text()) is False
    assert contents(folder) == before


def test_layers_without_an_update_change_their_form_alone(dense_source, packed_source, tmp_path):
    adapter = save_adapter(tiny_llama(), SparseLoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    merge_checkpoint(dense_source, adapter, tmp_path / "merged", packed=True)
    pack_checkpoint(dense_source, tmp_path / "packed")
    merged, packed = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "packed"))
    assert merged.keys() == packed.keys()
    changed = {name for name in packed if not same_bits(merged[name], packed[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.compressed" for layer in range(2)}
    entries = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("merged", "packed")]
    assert entries[0] == entries[1]


def test_a_two_four_layer_that_the_adapter_saves_whole_becomes_dense(packed_source, tmp_path):
    config = SparseLoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"])
    adapter = save_adapter(tiny_llama(), config, tmp_path / "adapter")
    report = merge_checkpoint(packed_source, adapter, tmp_path / "merged")
    assert (report.merged, report.replaced, report.packed) == (2, 2, 12)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(merged, merged_in_memory(tiny_llama(), adapter))


def test_merging_twice(dense_source, tmp_path):
    adapters = [
        save_adapter(tiny_llama(), SETTINGS["plain"], tmp_path / f"adapter-{seed}", seed=seed) for seed in (0, 1)
    ]
    merge_checkpoint(dense_source, adapters[0], tmp_path / "once", packed=True)
    merge_checkpoint(tmp_path / "once", adapters[1], tmp_path / "twice", packed=False)
    wanted = merged_in_memory(merged_in_memory(tiny_llama(), adapters[0]), adapters[1])
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), wanted)
    shutil.rmtree(tmp_path / "twice")


def test_a_weight_that_is_cancelled_stays_a_weight(tmp_path):
    model = tiny_llama()
    layer = model.model.layers[0].mlp.gate_proj
    layer.weight.data = two_four(*layer.weight.shape, seed=3)
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, SparseLoraConfig(r=1, target_modules=["gate_proj"]), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.mlp.gate_proj.sparse_low_rank_"
    column = int(layer.weight[0].nonzero()[0])
    tensors[f"{name}A"] = torch.zeros_like(tensors[f"{name}A"])
    tensors[f"{name}A"][0, column] = 1 / 8  # alpha is 8
    tensors[f"{name}B"][0, 0] = -layer.weight[0, column]
    save_file(tensors, file, metadata={"format": "pt"})
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").model.layers[0].mlp.gate_proj.weight
    assert merged[0, column] == torch.finfo(torch.float32).tiny
