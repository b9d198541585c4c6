"""A packed model whose files were damaged: a clear error every time, and never a model with other numbers."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from examples.packed_faults.damages import DAMAGES
from peft_variator.bases import CheckpointError, load_base, quantizer
from peft_variator.bases.checkpoint import Checkpoint, checksum

from .models import logits, tiny_llama


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_an_error_that_names_the_file(packed_dir, damage):
    file = packed_dir / "model.safetensors"
    whole = file.read_bytes()
    for seed in range(15):
        data = bytearray(whole)
        damage(data, random.Random(f"{damage.__name__} {seed}"))
        assert data != whole
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(packed_dir)
    file.write_bytes(whole)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(packed_dir)), logits(tiny_llama()))


@pytest.mark.parametrize("fault", ["a damaged value", "an error beside the checks"])
def test_nothing_reads_the_file_once_the_load_has_failed(packed_dir, monkeypatch, fault):
    """Else cutting the file off, to write it anew, would kill the process (SIGBUS)."""
    reading, check, name = [], Checkpoint.check_checksum, "model.layers.0.mlp.up_proj.compressed"

    def slow_check(self, stored):
        reading.append(stored.name)
        try:
            time.sleep(0 if stored.name == name else 0.1)
            check(self, stored)
        finally:
            reading.remove(stored.name)

    def fail(*args, **kwargs):
        raise CheckpointError("the model has no such place")

    monkeypatch.setattr(Checkpoint, "check_checksum", slow_check)
    if fault == "a damaged value":
        file = packed_dir / "model.safetensors"
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
        file.write_bytes(data)
    else:
        monkeypatch.setattr(Checkpoint, "check_checksums", fail)
        monkeypatch.setattr(quantizer, "plan_weights", fail)
    with pytest.raises(CheckpointError, match=r"model"):
        AutoModelForCausalLM.from_pretrained(packed_dir)
    assert reading == []


def test_a_flipped_value_names_its_tensor(packed_dir):
    file = packed_dir / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.1.mlp.up_proj.compressed"
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tensor {name}: its values do not match their checksum"):
        AutoModelForCausalLM.from_pretrained(packed_dir)


def test_a_bitmask_that_is_none_though_its_checksum_is_right(packed_dir):
    file = packed_dir / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj"
    tensors[f"{name}.bitmask"][3, 1] = 0x37
    checksums = {key: checksum(tensor) for key, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt", "crc32": json.dumps(checksums)})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name}\.bitmask, row 3: columns 8 to 11 keep 3"):
        AutoModelForCausalLM.from_pretrained(packed_dir)


def test_a_shard_that_is_missing_or_swapped(packed_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(packed_dir).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    files = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[1].write_bytes(first)
    with pytest.raises(CheckpointError, match=r"is also in"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    files[1].unlink()
    with pytest.raises((CheckpointError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    files[1].write_bytes(second)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_damaged_files_of_a_config_without_dtype(dense_dir):
    path, file = dense_dir / "config.json", dense_dir / "model.safetensors"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config))
    assert load_base(dense_dir).dtype == torch.float32
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        load_base(dense_dir)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"intermediate_size": 48}, {"num_hidden_layers": 3}])
def test_a_config_of_another_model(packed_dir, change):
    path = packed_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed_dir)
