"""Adapters above packed layers: SparseLoRA as above dense ones, PEFT's own LoRA, and what would lose an update."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.bases import CheckpointError, Sparse24Linear, merge_checkpoint, pack_checkpoint

from .models import contents, logits, tiny_llama
from .reference import same_bits, two_four_linear


IDS = torch.arange(1, 25).reshape(2, 12)
LABELS = IDS.masked_fill(torch.arange(12) < 9, -100)  # a prompt, which Variator plugins compress, and its answer


def adapted(model, config, seed: int = 0):
    """A model with an adapter whose update is not zero."""
    peft_model = get_peft_model(model, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return peft_model


def gradients(peft_model) -> dict[str, torch.Tensor]:
    peft_model.zero_grad()
    peft_model(input_ids=IDS, labels=LABELS).loss.backward()
    return {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}


CONFIGS = {
    "sparse_lora": SparseLoraConfig(r=4),
    "sparse_lora keeping the weight": SparseLoraConfig(r=4, recompute=False),
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "variator": VariatorConfig(compression_ratio=2, bottleneck_dim=4),
    "variator-neurons": VariatorConfig(compression_ratio=2, correction_dim=4),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_outputs_and_gradients_as_above_the_dense_base(packed_dir, config):
    dense, packed = adapted(tiny_llama(), config), adapted(AutoModelForCausalLM.from_pretrained(packed_dir), config)
    assert same_bits(logits(packed), logits(dense))
    wanted, actual = gradients(dense), gradients(packed)
    assert wanted.keys() == actual.keys()
    assert actual
    assert all(torch.equal(actual[name], gradient) for name, gradient in wanted.items())
    frozen = [name for name, p in packed.named_parameters() if name.endswith((".compressed", ".bitmask", ".shape"))]
    assert len(frozen) == 42


def test_sparse_lora_keeps_no_dense_copy_for_the_backward():
    packed = Sparse24Linear.from_dense(two_four_linear(64, 64))
    model = get_peft_model(nn.Sequential(packed), SparseLoraConfig(r=4, target_modules=["0"]))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(2, 64, requires_grad=True))
    assert packed.bitmask.data_ptr() in {tensor.data_ptr() for tensor in saved}  # the mask, one bit a weight
    assert all(tensor.data_ptr() in own or tensor.numel() <= 2 * 64 for tensor in saved)


def test_training_moves_the_adapter_and_no_file(packed_dir):
    before = contents(packed_dir)
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    packed = get_peft_model(model, SparseLoraConfig(r=4))
    frozen = {name: p.clone() for name, p in packed.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in packed.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = packed(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], p) for name, p in packed.named_parameters() if not p.requires_grad)
    assert contents(packed_dir) == before


def test_merging_gives_packed_layers_again(packed_dir, tmp_path):
    dense = adapted(tiny_llama(), SparseLoraConfig(r=4)).merge_and_unload()
    trained = adapted(AutoModelForCausalLM.from_pretrained(packed_dir), SparseLoraConfig(r=4))
    before = logits(trained)
    merged = trained.merge_and_unload()
    layers = [module for module in merged.modules() if isinstance(module, Sparse24Linear)]
    assert len(layers) == 14
    assert same_bits(logits(merged), logits(dense))
    assert torch.allclose(logits(merged), before, atol=1e-5)
    assert not any(layer.compressed[layer.compressed == 0].signbit().any() for layer in layers)
    merged.save_pretrained(tmp_path / "merged")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_merge_and_unmerge(packed_dir):
    packed = adapted(AutoModelForCausalLM.from_pretrained(packed_dir), SparseLoraConfig(r=4))
    before = logits(packed)
    with packed.disable_adapter():
        assert same_bits(logits(packed), logits(tiny_llama()))
    packed.merge_adapter()
    assert torch.allclose(logits(packed), before, atol=1e-5)
    packed.unmerge_adapter()
    assert torch.allclose(logits(packed), before, atol=1e-5)
    with packed.disable_adapter():
        assert torch.allclose(logits(packed), logits(tiny_llama()), atol=1e-5)


@pytest.mark.parametrize("method", ["sparse_lora", "lora", "variator"])
def test_an_adapter_moves_between_a_dense_and_a_packed_base(packed_dir, tmp_path, method):
    dense = adapted(tiny_llama(), CONFIGS[method])
    dense.save_pretrained(tmp_path / "adapter")
    packed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed_dir), tmp_path / "adapter")
    assert same_bits(logits(packed), logits(dense))


def test_places_that_are_kept_at_zero_can_be_learned(packed_dir):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    layer = model.model.layers[0].mlp.up_proj
    layer.compressed.data[0] = 0
    packed = adapted(model, SparseLoraConfig(r=4, target_modules=["up_proj"]))
    merged = packed.merge_and_unload().model.layers[0].mlp.up_proj
    assert merged.compressed[0].ne(0).all()
    assert same_bits(merged.bitmask, layer.bitmask)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_a_plain_lora_is_refused_with_the_reason(packed_dir, safe_merge):
    packed = adapted(AutoModelForCausalLM.from_pretrained(packed_dir), CONFIGS["lora"])
    before = logits(packed)
    with pytest.raises(
        NotImplementedError, match=r"A plain low-rank update does not keep the zeros: train and merge with"
    ):
        packed.merge_and_unload(safe_merge=safe_merge)
    assert same_bits(logits(packed), before)


def test_zeros_that_a_packed_base_keeps_are_part_of_its_mask(tmp_path):
    """Of 1:4 weights a packed base keeps one zero of each group, which an adapter fills; not so on the dense one."""
    model = tiny_llama()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            groups = module.weight.data.view(-1, 4)
            largest = groups.abs().argmax(1, keepdim=True)
            groups.mul_(torch.zeros_like(groups).scatter_(1, largest, 1))
    model.save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    above = adapted(packed, SparseLoraConfig(r=4))
    expected = logits(above)
    above.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tmp_path / "adapter")
    assert same_bits(logits(again), expected)
    with pytest.raises(ValueError, match="trained on another base"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="its zeros are others"):
        merge_checkpoint(tmp_path / "dense", tmp_path / "adapter", tmp_path / "wrong", packed=True)
    merge_checkpoint(tmp_path / "packed", tmp_path / "adapter", tmp_path / "merged", packed=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [SparseLoraConfig(r=2), VariatorConfig(bottleneck_dim=4)], ids=["lora", "plugin"])
def test_a_packed_layer_is_no_module_to_save(packed_dir, config):
    config = copy.deepcopy(config)
    config.modules_to_save = ["down_proj"]
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    with pytest.raises(ValueError, match=r"modules_to_save.*down_proj.*ignore="):
        get_peft_model(model, config)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SparseLoraConfig(r=2, target_modules=["q_proj"]),
        VariatorConfig(correction_dim=8, compensation_rank=2),
        VariatorConfig(bottleneck_dim=4),
    ],
    ids=["lora", "neurons", "bottleneck"],
)
def test_what_is_loaded_onto_a_base_in_half_precision_is_not_rounded(config, low_cpu_mem_usage, tmp_path):
    model = adapted(tiny_llama().to(torch.bfloat16), config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    base = tiny_llama().to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == saved.keys()
    assert any(not torch.equal(value, value.bfloat16().to(value.dtype)) for value in saved.values())
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    halves = PeftModel.from_pretrained(
        tiny_llama().to(torch.bfloat16),
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=False,
    )
    floating = [value for value in get_peft_model_state_dict(halves).values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.bfloat16}
