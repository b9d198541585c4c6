"""A packed model whose files were damaged: a clear error every time, and never a model with other numbers."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_variator.bases import CheckpointError

from .models import logits, tiny_llama


def flip_a_bit(data: bytearray, generator: random.Random) -> None:
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def overwrite_in_the_header(data: bytearray, generator: random.Random) -> None:
    position = generator.randrange(8 + int.from_bytes(data[:8], "little"))
    data[position] = (data[position] + generator.randrange(1, 256)) % 256


def cut_off_the_end(data: bytearray, generator: random.Random) -> None:
    del data[generator.randrange(len(data)) :]


def append(data: bytearray, generator: random.Random) -> None:
    data += bytes(generator.randrange(1, 100))


def remove_from_the_middle(data: bytearray, generator: random.Random) -> None:
    start = generator.randrange(len(data) - 64)
    del data[start : start + generator.randrange(1, 64)]


def forge_the_length_of_the_header(data: bytearray, generator: random.Random) -> None:
    length = int.from_bytes(data[:8], "little")
    data[:8] = generator.choice([0, 1, length - 8, length + 8, 10**9, 2**63]).to_bytes(8, "little")


def forge_the_header(data: bytearray, generator: random.Random) -> None:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = generator.choice([name for name in header if name != "__metadata__" and "norm" not in name])
    twins = [other for other in header if other != name and header[other].get("shape") == header[name]["shape"]]
    twins = [
        other for other in twins if header[other]["dtype"] == header[name]["dtype"] and not name.endswith(".shape")
    ]
    kind = generator.choice(["shape", "dtype", "offset", "rename", "size", "swap", "checksum"])
    if kind == "shape":
        header[name]["shape"] = [1, *header[name]["shape"]]
    elif kind == "dtype":
        header[name]["dtype"] = {"F32": "I32", "U8": "I8", "I64": "F64"}[header[name]["dtype"]]
    elif kind == "offset":
        header[name]["data_offsets"][1] += generator.choice([-4, 4, 10**12])
    elif kind == "rename":
        header[f"{name}x"] = header.pop(name)
    elif kind == "swap" and twins:
        other = generator.choice(twins)
        header[name], header[other] = header[other], header[name]
    elif kind == "size":
        header[name]["shape"] = [2**40, 2**40]
    else:
        del header["__metadata__"]
    text = json.dumps(header).encode()
    data[: 8 + length] = len(text).to_bytes(8, "little") + text


DAMAGES = [
    flip_a_bit,
    overwrite_in_the_header,
    cut_off_the_end,
    append,
    remove_from_the_middle,
    forge_the_length_of_the_header,
    forge_the_header,
]


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


def test_a_flipped_value_names_its_tensor(packed_dir):
    file = packed_dir / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.1.mlp.up_proj.compressed"
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tensor {name}: its values do not match their checksum"):
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


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"intermediate_size": 48}, {"num_hidden_layers": 3}])
def test_a_config_of_another_model(packed_dir, change):
    path = packed_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed_dir)
