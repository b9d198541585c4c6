"""`from_pretrained` and `save_pretrained` of packed models: devices, dtypes, shards, ties, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from peft_variator import PruningConfig, prune
from peft_variator.bases import (
    CheckpointError,
    Sparse24Config,
    Sparse24Linear,
    load_base,
    pack_checkpoint,
    quantizer,
)
from peft_variator.bases.quantizer import save_base
from tests.tiny_models import tiny_model

from .models import ON_DISK, contents, logits, tiny_bert, tiny_llama, tiny_t5
from .reference import same_bits


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Sparse24Linear)]


def load(folder, cls=AutoModelForCausalLM, **kwargs):
    """A model, and that nothing was missing or unexpected."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def test_a_packed_model_equals_the_dense_one(packed_dir):
    dense, before = tiny_llama(), contents(packed_dir)
    model = load(packed_dir)
    assert len(packed_layers(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert same_bits(logits(model), logits(dense))
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, Sparse24Linear) for p in m.parameters())
    assert model.model.norm.weight.requires_grad
    assert not model.training
    assert contents(packed_dir) == before


def test_packing_while_loading_equals_packing_on_disk(dense_dir, packed_dir):
    before = contents(dense_dir)
    model, other = load(dense_dir, quantization_config=Sparse24Config()), load(packed_dir)
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert contents(dense_dir) == before


DEVICE_MAPS = {
    "auto": "auto",
    "cpu": "cpu",
    "explicit": {"": "cpu"},
    "disk": ON_DISK,
    "all on disk": {"model": "disk", "lm_head": "disk"},
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS.keys())
@pytest.mark.parametrize("unpacked", ["forward", "always"])
def test_device_maps_and_offloading(packed_dir, device_map, unpacked):
    dense, before = tiny_llama(), contents(packed_dir)
    model = load(packed_dir, device_map=device_map)
    for module in model.modules():
        if isinstance(module, Sparse24Linear):
            module.unpacked = unpacked
    for _ in range(2):
        assert same_bits(logits(model), logits(dense))
    layer = model.model.layers[1].mlp.up_proj
    assert (
        layer.offloaded == layer.compressed.is_meta == (isinstance(device_map, dict) and "disk" in device_map.values())
    )
    assert contents(packed_dir) == before


def test_offloading_while_packing(dense_dir, tmp_path):
    model = load(
        dense_dir,
        quantization_config=Sparse24Config(),
        device_map=DEVICE_MAPS["disk"],
        offload_folder=tmp_path / "offload",
    )
    assert model.model.layers[1].mlp.up_proj.compressed.is_meta
    assert same_bits(logits(model), logits(tiny_llama()))
    model.save_pretrained(tmp_path / "again")
    assert same_bits(logits(load(tmp_path / "again")), logits(tiny_llama()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", None])
def test_dtype(packed_dir, dense_dir, dtype):
    model = load(packed_dir, dtype=dtype)
    dense = LlamaForCausalLM.from_pretrained(dense_dir, dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.compressed.dtype == dense.model.layers[0].mlp.up_proj.weight.dtype
    assert model.model.layers[0].mlp.up_proj.bitmask.dtype == torch.uint8
    assert same_bits(logits(model), logits(dense))
    packing = load(dense_dir, dtype=dtype, quantization_config=Sparse24Config())
    assert same_bits(logits(packing), logits(dense))


def test_low_cpu_mem_usage_is_taken(packed_dir):
    assert same_bits(logits(load(packed_dir, low_cpu_mem_usage=True)), logits(tiny_llama()))


def test_a_model_can_move_and_be_cast(packed_dir):
    model = load(packed_dir)
    assert same_bits(logits(model.to("cpu").to(torch.bfloat16)), logits(tiny_llama().to(torch.bfloat16)))


def test_sharded_files(dense_dir, tmp_path):
    load(dense_dir).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    pack_checkpoint(tmp_path / "sharded", tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 2
    assert same_bits(logits(load(tmp_path / "packed")), logits(tiny_llama()))
    assert same_bits(logits(load(tmp_path / "packed", device_map=DEVICE_MAPS["disk"])), logits(tiny_llama()))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("shard", ["10KB", "5GB"])
def test_save_pretrained_writes_the_packed_form(packed_dir, tmp_path, offload, shard):
    model = load(packed_dir, device_map=DEVICE_MAPS["disk"] if offload else None)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "10KB")
    names = set()
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
            assert "crc32" in handle.metadata()
    with safe_open(packed_dir / "model.safetensors", framework="pt") as handle:
        assert names == set(handle.keys())
    written, original = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path / "again", packed_dir)
    )
    assert written == original
    again = load(tmp_path / "again")
    assert same_bits(logits(again), logits(tiny_llama()))
    assert len(packed_layers(again)) == 14


def test_push_to_hub_uploads_the_packed_form(packed_dir, tmp_path, monkeypatch):
    model, uploaded = load(packed_dir), []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return self

        repo_id = "someone/model"

    class Card:
        def save(self, path):
            pass

    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(
        type(model), "_upload_modified_files", lambda self, folder, *args, **kwargs: uploaded.append(folder)
    )
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="someone/model")
    assert uploaded == [tmp_path / "pushed"]
    assert same_bits(logits(load(uploaded[0])), logits(tiny_llama()))
    assert len(packed_layers(load(uploaded[0]))) == 14


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings(tmp_path, tie):
    dense = tiny_llama(tie=tie)
    dense.save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    for model in (load(tmp_path / "packed"), load(tmp_path / "dense", quantization_config=Sparse24Config())):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
        assert same_bits(logits(model), logits(dense))
        model.save_pretrained(tmp_path / "again")
        assert same_bits(logits(load(tmp_path / "again")), logits(dense))


def test_a_tied_layer_stays_dense_even_if_it_is_two_four(tmp_path):
    dense = tiny_llama(tie=True)
    dense.model.embed_tokens.weight.data[:, 2:] = 0
    dense.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=Sparse24Config())
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("make", "cls"), [(tiny_bert, AutoModelForSequenceClassification), (tiny_t5, AutoModelForSeq2SeqLM)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_architectures(make, cls, dtype, tmp_path):
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    expected = cls.from_pretrained(tmp_path / "dense", dtype=dtype)
    for model in (
        load(tmp_path / "packed", cls, dtype=dtype),
        load(tmp_path / "dense", cls, dtype=dtype, quantization_config=Sparse24Config()),
    ):
        assert packed_layers(model)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {
            p.dtype for p in expected.parameters()
        }
        assert same_bits(logits(model), logits(expected))


def test_the_base_model_of_a_checkpoint_and_back(packed_dir, tmp_path):
    base = AutoModel.from_pretrained(packed_dir)
    assert len(packed_layers(base)) == 14
    assert same_bits(logits(base), logits(tiny_llama().model))
    base.save_pretrained(tmp_path / "base")
    assert same_bits(logits(load(tmp_path / "base", AutoModel)), logits(base))


def test_a_new_head_may_be_missing_but_no_part_of_the_base(packed_dir):
    model = AutoModelForSequenceClassification.from_pretrained(packed_dir, num_labels=2)
    assert len(packed_layers(model)) == 14
    assert same_bits(logits(model.model), logits(tiny_llama().model))


def test_deepcopy_state_dict_and_dequantize(packed_dir, tmp_path):
    model = load(packed_dir)
    clone = copy.deepcopy(model)
    clone.save_pretrained(tmp_path / "clone")
    assert same_bits(logits(load(tmp_path / "clone")), logits(model))
    fresh = load(packed_dir)
    for parameter in fresh.parameters():
        if parameter.is_floating_point():
            parameter.data.zero_()
    fresh.load_state_dict(model.state_dict())
    assert same_bits(logits(fresh), logits(model))
    dense = fresh.dequantize()
    assert not packed_layers(dense)
    assert same_bits(logits(dense), logits(model))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert same_bits(logits(LlamaForCausalLM.from_pretrained(tmp_path / "dense")), logits(model))


def test_generation_goes_through_packed_layers(packed_dir):
    dense, model = tiny_llama(), load(packed_dir)
    ids = torch.arange(1, 6).unsqueeze(0)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **arguments), dense.generate(ids, **arguments))


def test_unpacked_comes_from_the_config(dense_dir, tmp_path):
    model = load(dense_dir, quantization_config=Sparse24Config(unpacked="always"))
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").model.layers[0].mlp.up_proj.unpacked == "always"


def test_targets_and_ignore_while_packing(dense_dir):
    model = load(
        dense_dir, quantization_config=Sparse24Config(ignore=[r"re:.*\.mlp\.", "model.layers.0.self_attn.q_proj"])
    )
    assert len(packed_layers(model)) == 7
    model = load(dense_dir, quantization_config=Sparse24Config(targets=[r"re:.*q_proj"]))
    assert packed_layers(model) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head\.weight, row 0: columns 0 to 3 have 4"):
        load(dense_dir, quantization_config=Sparse24Config(targets=["Linear"]))


def test_a_model_without_two_four_weights_is_refused(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no linear layer of LlamaForCausalLM is 2:4"):
        load(tmp_path / "dense", quantization_config=Sparse24Config())


@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_cannot_be_packed_are_named(tmp_path, tied):
    """GPT-2's are no `nn.Linear`, and to prune them would not help; an untied head is one."""
    torch.manual_seed(0)
    model = tiny_model("gpt2", tie_word_embeddings=tied)
    prune(model, PruningConfig(method="magnitude", pattern="2:4"))
    model.save_pretrained(tmp_path / "dense")
    for attempt in (load_base, lambda folder: pack_checkpoint(folder, tmp_path / "packed")):
        with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.attn\.c_attn.* are Conv1D layers") as error:
            attempt(tmp_path / "dense")
        assert "Leave it dense" in str(error.value)
        assert ("prune its nn.Linear layers" in str(error.value)) is not tied


def test_a_state_dict_instead_of_files_is_refused(dense_dir):
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="safetensors files"):
        LlamaForCausalLM.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=Sparse24Config()
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"unpacked": "never"}, "unpacked='never'"), ({"format": "pack-quantized"}, "format='pack-quantized'")],
)
def test_config_refuses_what_it_does_not_know(fields, message):
    with pytest.raises(ValueError, match=message):
        Sparse24Config(**fields)
    entry = Sparse24Config().to_dict()
    entry["sparsity_config"].update(fields)
    with pytest.raises(ValueError, match=message):
        Sparse24Config.from_dict(entry)


def test_config_refuses_foreign_entries():
    entry = Sparse24Config(targets=["Linear"], ignore=["lm_head"], checksums=True).to_dict()
    assert Sparse24Config.from_dict(json.loads(json.dumps(entry))).to_dict() == entry
    for change in ({"sparsity_structure": "unstructured"}, {"colour": "red"}):
        with pytest.raises(ValueError, match="no entry of a packed 2:4 model"):
            Sparse24Config.from_dict({**entry, "sparsity_config": {**entry["sparsity_config"], **change}})
    with pytest.raises(ValueError, match="no entry of a packed 2:4 model"):
        Sparse24Config.from_dict({"quant_method": "sparse24"})


def test_registering_again_does_nothing():
    before = AUTO_QUANTIZATION_CONFIG_MAPPING["sparse24"], AUTO_QUANTIZER_MAPPING["sparse24"]
    quantizer.register()
    assert (AUTO_QUANTIZATION_CONFIG_MAPPING["sparse24"], AUTO_QUANTIZER_MAPPING["sparse24"]) == before


@pytest.mark.slow  # test_main has a program that loads a packed base too
def test_a_fresh_process_loads_it_after_importing_the_package_alone(packed_dir):
    script = (
        "import sys, torch, peft_variator; from transformers import AutoModelForCausalLM as A;"
        f"print(sum('Sparse24' in type(m).__name__ for m in A.from_pretrained({str(packed_dir)!r}).modules()))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "14"


def test_a_dtype_by_its_old_name(packed_dir, tmp_path):
    shutil.copytree(packed_dir, tmp_path / "no_dtype")
    config = json.loads((tmp_path / "no_dtype" / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "no_dtype" / "config.json").write_text(json.dumps(config))
    for name in ("dtype", "torch_dtype"):
        assert load_base(tmp_path / "no_dtype", **{name: torch.float16}).dtype == torch.float16
    assert load_base(tmp_path / "no_dtype").dtype == torch.float32


def test_a_state_dict_beside_a_packed_model_is_refused(packed_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    with pytest.raises(ValueError, match="not those of a state_dict"):
        save_base(model, tmp_path / "out", state_dict=model.state_dict())
    assert not (tmp_path / "out").exists()
    save_base(tiny_llama(), tmp_path / "dense", state_dict=tiny_llama().state_dict())
