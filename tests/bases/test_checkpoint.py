"""Reading headers, checksums and indices, and writing shards tensor by tensor."""

from __future__ import annotations

import json
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_variator.bases import CheckpointError
from peft_variator.bases.checkpoint import Checkpoint, ShardWriter, checksum, spec_of

from .reference import same_bits


TENSORS = {
    "b.weight": torch.randn(3, 5).to(torch.bfloat16),
    "a.bitmask": torch.arange(7, dtype=torch.uint8).reshape(7, 1),
    "a.shape": torch.tensor([[3], [5]]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "half": torch.randn(5).half(),
    "eight": torch.randn(3).to(torch.float8_e4m3fn),
    "ünï.weight": torch.randn(2, 2, dtype=torch.float64),
}


def write(path, tensors=TENSORS):
    with ShardWriter(path, {name: spec_of(tensor) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def test_the_library_reads_what_the_writer_writes(tmp_path):
    path = write(tmp_path / "model.safetensors")
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(same_bits(loaded[name].reshape(-1), tensor.reshape(-1)) for name, tensor in TENSORS.items())
    assert all(loaded[name].shape == tensor.shape for name, tensor in TENSORS.items())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["crc32"]) == {name: checksum(tensor) for name, tensor in TENSORS.items()}
    Checkpoint.from_files([path]).check_checksums()


def test_checksum_covers_dtype_shape_and_bytes():
    tensor = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert checksum(tensor) == f"{zlib.crc32(b'U8 [1, 4] ' + bytes([1, 2, 3, 4])):08x}"
    others = [tensor.view(4, 1), tensor.view(torch.int8), tensor + 1]
    assert len({checksum(other) for other in [tensor, *others]}) == 4
    assert checksum(torch.ones(4, 6)[:, ::2]) == checksum(torch.ones(4, 3))


def test_the_writer_refuses_what_was_not_announced(tmp_path):
    path = tmp_path / "model.safetensors"

    def write_some(tensors):
        with ShardWriter(path, {name: spec_of(tensor) for name, tensor in TENSORS.items()}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    with pytest.raises(ValueError, match=r"b\.weight is .* announced"):
        write_some({"b.weight": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=r"a\.shape of .* was announced and not written"):
        write_some({name: tensor for name, tensor in TENSORS.items() if name != "a.shape"})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_no_file(tmp_path):
    def interrupted():
        specs = {name: spec_of(tensor) for name, tensor in TENSORS.items()}
        with ShardWriter(tmp_path / "model.safetensors", specs) as writer:
            writer.write("b.weight", TENSORS["b.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_sharded_directory(tmp_path):
    write(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    write(tmp_path / "two.safetensors", {"b": torch.ones(3), "c": torch.ones(4)})
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.from_directory(tmp_path)
    assert {name: stored.file.name for name, stored in checkpoint.tensors.items()} == weight_map
    assert checkpoint.tensors["b"].read().tolist() == [1, 1, 1]
    for wrong, message in [
        ({"a": "two.safetensors"}, "tensor a is not in two.safetensors"),
        ({"d": "two.safetensors"}, "tensor d is not in two.safetensors"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors can't be read"),
        ({"a": "../one.safetensors"}, "not a file beside the index"),
        ({"a": "/etc/passwd"}, "not a file beside the index"),
    ]:
        index.write_text(json.dumps({"weight_map": {**weight_map, **wrong}}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.from_directory(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"safetensors\.index\.json"):
            Checkpoint.from_directory(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        Checkpoint.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a safetensors file"):
        Checkpoint.from_files([tmp_path / "pytorch_model.bin"])
    write(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    write(tmp_path / "two.safetensors", {"a": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor a is also in .*one\.safetensors"):
        Checkpoint.from_files([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tensor a has no checksum"),
        ({"crc32": '{"b": "00000000"}'}, "tensor a has no checksum"),
        ({"crc32": '{"a": "00000000"}'}, "do not match their checksum"),
        ({"crc32": "{"}, "are not JSON"),
        ({"crc32": "[]"}, "are a list"),
    ],
)
def test_checksums_that_do_not_fit(tmp_path, metadata, message):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{message}"):
        Checkpoint.from_directory(tmp_path).check_checksums()
