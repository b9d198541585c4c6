"""Packing and unpacking on disk: bit for bit, in constant memory, whole or not at all, taken up where it stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from peft_variator import SparseLoraConfig
from peft_variator.bases import CheckpointError, checkpoint, pack_checkpoint, unpack_checkpoint
from peft_variator.bases.packing import pack
from peft_variator.cli.main import app
from peft_variator.files import sole_writer

from .models import contents, logits, tiny_bert, tiny_llama
from .reference import reference_pack, same_bits, two_four


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def sharded_dir(dense_dir, tmp_path) -> Path:
    AutoModelForCausalLM.from_pretrained(dense_dir).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_bit_for_bit(tmp_path, dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "1_Pooling").mkdir()
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "dense" / "pytorch_model.bin").write_text("not to be copied")
    before = contents(tmp_path / "dense")
    report = pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert report.converted == 14
    assert report.bytes_after < report.bytes_before
    source, packed = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "packed")
    for name, weight in source.items():
        module = name.removesuffix(".weight")
        if f"{module}.compressed" in packed:
            compressed, bitmask = reference_pack(weight)
            assert same_bits(packed[f"{module}.compressed"], compressed)
            assert torch.equal(packed[f"{module}.bitmask"], bitmask)
            assert packed[f"{module}.shape"].tolist() == [[size] for size in weight.shape]
        else:
            assert same_bits(packed[name], weight)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == source.keys()
    assert all(same_bits(again[name], tensor) for name, tensor in source.items())
    config, original = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "dense"))
    assert config == original
    for folder in ("packed", "again"):
        others = {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "1_Pooling/config.json",
            *(["README.md"] if folder == "packed" else []),
        }
        assert contents(tmp_path / folder).keys() == others
    assert contents(tmp_path / "dense") == before


def test_shards_stay_shards(sharded_dir, tmp_path):
    pack_checkpoint(sharded_dir, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    for folder in ("packed", "again"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        tensors = tensors_of(tmp_path / folder)
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert contents(tmp_path / "again").keys() == contents(sharded_dir).keys()
    source, again = tensors_of(sharded_dir), tensors_of(tmp_path / "again")
    assert all(same_bits(again[name], tensor) for name, tensor in source.items())


def test_unpacking_what_save_pretrained_split_over_shards(packed_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    unpack_checkpoint(tmp_path / "sharded", tmp_path / "dense")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(tiny_llama()))


def test_config_says_what_is_packed(dense_dir, tmp_path):
    pack_checkpoint(dense_dir, tmp_path / "packed", ignore=["re:.*up_proj"])
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "sparse24",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
            "ignore": ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
            "unpacked": "forward",
            "checksums": True,
        },
    }


def test_a_config_without_dtype_gets_one(dense_dir, tmp_path):
    path = dense_dir / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps(config))
    pack_checkpoint(dense_dir, tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["dtype"] == "float32"


def test_adapters_beside_the_weights_stay_behind(dense_dir, tmp_path):
    """Where their config is, transformers looks for their weights."""
    base = AutoModelForCausalLM.from_pretrained(dense_dir)
    expected = logits(base)
    adapter = get_peft_model(base, SparseLoraConfig(r=2))
    for folder in (dense_dir, dense_dir / "adapter", dense_dir / "more" / "adapter"):
        adapter.save_pretrained(folder)
    (dense_dir / "more" / "notes.txt").write_text("kept")
    pack_checkpoint(dense_dir, tmp_path / "packed")
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    for folder in ("packed", "unpacked"):
        assert not list((tmp_path / folder).rglob("adapter*"))
        assert (tmp_path / folder / "more" / "notes.txt").read_text() == "kept"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")), expected)


def test_biases_and_heads_of_an_encoder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    entry = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert entry["sparsity_config"]["ignore"] == ["classifier"]
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    source, again = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "again")
    assert all(same_bits(again[name], tensor) for name, tensor in source.items())


def test_what_is_required_and_not_two_four(dense_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head\.weight, row 0: columns 0 to 3 have 4"):
        pack_checkpoint(dense_dir, tmp_path / "packed", targets=["Linear"])
    with pytest.raises(CheckpointError, match=r"targets=\['q_proj'\] match no linear layer of LlamaForCausalLM"):
        pack_checkpoint(dense_dir, tmp_path / "packed", targets=["q_proj"])
    for fields in ({"targets": ["re:("]}, {"ignore": ["re:("]}):
        with pytest.raises(ValueError, match=r"'re:\(' is no regular expression"):
            pack_checkpoint(dense_dir, tmp_path / "packed", **fields)
    assert not (tmp_path / "packed").exists()


def test_refusals(dense_dir, packed_dir, tmp_path):
    with pytest.raises(CheckpointError, match="packed already"):
        pack_checkpoint(packed_dir, tmp_path / "out")
    with pytest.raises(CheckpointError, match="dense already"):
        unpack_checkpoint(dense_dir, tmp_path / "out")
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        pack_checkpoint(dense_dir, packed_dir)
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        pack_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    config = json.loads((dense_dir / "config.json").read_text())
    (dense_dir / "config.json").write_text(json.dumps({**config, "architectures": ["Mystery"]}))
    with pytest.raises(CheckpointError, match=r"architectures=\['Mystery'\] names no class of transformers"):
        pack_checkpoint(dense_dir, tmp_path / "out")
    (dense_dir / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        pack_checkpoint(dense_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_sources_are_not_converted(dense_dir, packed_dir, tmp_path):
    for folder, convert in ((dense_dir, pack_checkpoint), (packed_dir, unpack_checkpoint)):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
            convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    """Stands for a process that ends: nothing of ours catches it."""


@pytest.fixture
def foreign_dir(packed_dir) -> Path:
    """The packed model without checksums, which would find every change first."""
    path = packed_dir / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity_config"]["checksums"] = False
    path.write_text(json.dumps(config))
    return packed_dir


def test_sources_that_are_not_the_model_of_their_config(dense_dir, foreign_dir, tmp_path):
    packed, dense, module = tensors_of(foreign_dir), tensors_of(dense_dir), "model.layers.1.mlp.up_proj"
    rows, columns = packed[f"{module}.shape"].flatten().tolist()
    other = torch.zeros(columns, rows)
    other[:, ::2] = 1
    turned = packed | {f"{module}.{part}": tensor for part, tensor in pack(other)._asdict().items()}
    without = {name: tensor for name, tensor in packed.items() if not name.startswith(f"{module}.")}
    for tensors, message in (
        (without, rf"{module}\.weight .*missing"),
        (turned, rf"it stores .*\({columns}, {rows}\)"),
    ):
        save_file(tensors, foreign_dir / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            unpack_checkpoint(foreign_dir, tmp_path / "new")
    del dense[f"{module}.weight"]
    save_file(dense, dense_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{module}\.weight .*missing"):
        pack_checkpoint(dense_dir, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("after", range(0, 49, 8))
def test_an_interrupted_run_is_taken_up(sharded_dir, tmp_path, monkeypatch, after):
    pack_checkpoint(sharded_dir, tmp_path / "whole")
    written = []
    write = checkpoint.ShardWriter.write

    def dying(self, name, tensor):
        if len(written) == after:
            raise Killed
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(checkpoint.ShardWriter, "write", dying)
    with pytest.raises(Killed):
        pack_checkpoint(sharded_dir, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    kept = {file.name for file in (tmp_path / ".packed.partial").glob("*.safetensors")}
    # what a SIGKILL leaves and an exception does not
    (tmp_path / ".packed.partial" / "model-00001-of-00005.safetensors.partial").write_bytes(b"half")
    again = []
    monkeypatch.setattr(
        checkpoint.ShardWriter, "write", lambda self, name, tensor: again.append(name) or write(self, name, tensor)
    )
    pack_checkpoint(sharded_dir, tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
    assert not (tmp_path / ".packed.partial").exists()
    index = json.loads((tmp_path / "packed" / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(again) == sorted(name for name, file in index.items() if file not in kept)


def test_another_run_does_not_take_up_what_is_not_its_own(sharded_dir, tmp_path, monkeypatch):
    write = checkpoint.ShardWriter.write

    def dying(self, name, tensor):
        if "layers.1" in name:
            raise Killed
        write(self, name, tensor)

    monkeypatch.setattr(checkpoint.ShardWriter, "write", dying)
    with pytest.raises(Killed):
        pack_checkpoint(sharded_dir, tmp_path / "packed")
    monkeypatch.setattr(checkpoint.ShardWriter, "write", write)
    pack_checkpoint(sharded_dir, tmp_path / "packed", ignore=["re:.*layers.0"])
    names = tensors_of(tmp_path / "packed").keys()
    assert sum(name.endswith(".compressed") for name in names) == 7


@pytest.mark.slow
def test_killed_runs_leave_the_target_whole_or_absent(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "packed_faults" / "kill.py"
    command = [sys.executable, script, "--rounds", "6", "--output", tmp_path / "kill.json"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    counts = json.loads((tmp_path / "kill.json").read_text())["counts"]
    assert counts.keys() == {"pack", "unpack", "merge", "save_base", "save_pretrained"}
    for name in ("pack", "unpack", "merge", "save_base"):
        assert counts[name].get("target whole", 0) + counts[name].get("target absent", 0) == 6


def memory_of_conversions(folder):
    """Bytes in use after each tensor of packing `folder / "dense"` and unpacking it again, beyond those before."""
    pack_checkpoint(folder / "dense", folder / "warm")  # libraries and tables are loaded
    unpack_checkpoint(folder / "warm", folder / "warm again")
    process, used = psutil.Process(), []
    before = process.memory_info().rss

    def note(*_):
        used.append(process.memory_info().rss - before)

    pack_checkpoint(folder / "dense", folder / "packed", on_progress=note)
    unpack_checkpoint(folder / "packed", folder / "again", on_progress=note)
    return used


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """28 tensors of 4 MB, in files of seven: the memory in use stays under one file, a quarter of them."""
    rows, width, layers = 1024, 1024, 4
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=rows, num_hidden_layers=layers, num_attention_heads=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "dense")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weight_map, weight = {}, two_four(rows, width)
    for part in (*(f".layers.{index}" for index in range(layers)), ""):
        names = [name for name in shapes if part in name and name not in weight_map]
        shard = {name: weight.clone() if shapes[name] == weight.shape else torch.ones(shapes[name]) for name in names}
        save_file(shard, tmp_path / "dense" / f"model{part}.safetensors")
        weight_map |= dict.fromkeys(shard, f"model{part}.safetensors")
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # In a process of its own: what other tests left in the heap would be counted, too.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        used = pool.submit(memory_of_conversions, tmp_path).result()
    assert len(used) > 20
    assert max(used) < 7 * weight.nbytes


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_the_commands(dense_dir, tmp_path):
    result = run("pack", str(dense_dir), "--output", str(tmp_path / "packed"))
    assert result.exit_code == 0, result.output
    assert "Converted 14 weights" in result.output
    assert str(tmp_path / "packed") in result.output
    result = run("unpack", str(tmp_path / "packed"), "-o", str(tmp_path / "again"))
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "again").keys() == contents(dense_dir).keys()
    source, again = tensors_of(dense_dir), tensors_of(tmp_path / "again")
    assert all(same_bits(again[name], tensor) for name, tensor in source.items())


def test_the_commands_report_errors(dense_dir, packed_dir, tmp_path):
    result = run("pack", str(dense_dir), "--output", str(tmp_path / "out"), "--target", "Linear")
    assert result.exit_code == 1
    assert "lm_head.weight, row 0" in result.output
    result = run("pack", str(dense_dir), "--output", str(packed_dir))
    assert result.exit_code == 1
    assert "already exists and is not empty" in result.output
    result = run("unpack", str(dense_dir), "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "dense already" in result.output
    result = run(
        "pack", str(dense_dir), "--output", str(tmp_path / "out"), "--ignore", "lm_head", "--target", "Linear"
    )
    assert result.exit_code == 0, result.output
    shutil.rmtree(tmp_path / "out")


def test_the_readme_says_first_what_transformers_alone_does(tmp_path) -> None:
    from peft_variator.bases.config import write_notice

    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\n---\n\n# My model\n")
    for _ in range(2):
        write_notice(tmp_path)
        text = readme.read_text()
        assert text.startswith("---\nlicense: mit\n---\n\n**Import `peft_variator` before you load this model.**")
        assert text.endswith("# My model\n")
        assert text.count("random numbers") == 1


def test_one_file_beside_an_index_is_what_is_loaded(dense_dir, tmp_path):
    """As `from_pretrained` reads them: a model saved in shards over one saved in a file leaves both."""
    model = AutoModelForCausalLM.from_pretrained(dense_dir)
    model.save_pretrained(tmp_path / "both")
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both"))
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    model.save_pretrained(tmp_path / "both", max_shard_size="20KB")
    assert (tmp_path / "both" / "model.safetensors").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both")), loaded)
    pack_checkpoint(tmp_path / "both", tmp_path / "packed")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), loaded)
    unpack_checkpoint(tmp_path / "packed", tmp_path / "again")
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), loaded)


def test_two_runs_do_not_write_to_one_output(dense_dir, tmp_path):
    output = tmp_path / "packed"
    with sole_writer(tmp_path / ".packed.partial"), pytest.raises(FileExistsError, match="Another run is writing"):
        pack_checkpoint(dense_dir, output)
    assert not output.exists()
    pack_checkpoint(dense_dir, output)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output)), logits(tiny_llama()))


def test_a_file_system_without_locks_is_written_to(dense_dir, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("peft_variator.files.fcntl.flock", unsupported)
    pack_checkpoint(dense_dir, tmp_path / "packed")
    assert (tmp_path / "packed" / "config.json").exists()
