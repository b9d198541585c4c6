"""Files that passed their checks are remembered while nothing writes to them; a flipped bit still stops the load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from peft_variator.bases import CheckpointError, load_base, save_base, unpack_checkpoint
from peft_variator.bases import file_checks as module
from peft_variator.bases.checkpoint import Checkpoint, StoredTensor
from peft_variator.bases.compressed_tensors import StoredWeight
from peft_variator.bases.file_checks import SWITCH, FileChecks

from .models import logits, tiny_llama


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where records go; files may be as new as those of a test are."""
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SETTLED_NANOSECONDS", -1)
    return tmp_path / "cache" / "peft_variator"


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """What was checked: names of tensors and of weights."""
    done: list[str] = []
    of_tensor, of_weight = Checkpoint.check_checksum, StoredWeight.check

    def check_checksum(self, stored):
        done.append(stored.name)
        of_tensor(self, stored)

    def check(self):
        done.append(self.name)
        of_weight(self)

    monkeypatch.setattr(Checkpoint, "check_checksum", check_checksum)
    monkeypatch.setattr(StoredWeight, "check", check)
    return done


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def flip_a_bit(file: Path) -> None:
    """In place, as an ordinary write does, with the time of modification put back."""
    before = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-5, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-5, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def records(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.json"))


def test_an_unchanged_file_is_checked_once(packed_dir, cache, checked, monkeypatch):
    load(packed_dir)
    names = set(Checkpoint.from_directory(packed_dir).tensors)
    assert set(checked) == {*names, *(name.replace("bitmask", "weight") for name in names if "bitmask" in name)}
    assert [entry.name for entry in cache.iterdir()] == [file.name for file in records(cache)]
    assert len(records(cache)) == 1
    assert records(cache)[0].stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    checked.clear()
    read, plain = [], StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self: read.append(self.name) or plain(self))
    model = load(packed_dir)
    assert not checked
    assert all(name.endswith(".shape") for name in read)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_a_flipped_bit_stops_the_load_after_a_remembered_one(packed_dir, cache):
    for _ in range(2):
        load(packed_dir)
    flip_a_bit(weights_of(packed_dir))
    for load_it in (load, load_base, load):
        with pytest.raises(CheckpointError, match=r"model\.safetensors, tensor .* do not match their checksum"):
            load_it(packed_dir)


def test_a_flipped_bit_of_a_remembered_file_stops_what_writes_folders(packed_dir, cache, checked, tmp_path):
    load(packed_dir)
    checked.clear()
    unpack_checkpoint(packed_dir, tmp_path / "dense")
    assert len(checked) >= len(Checkpoint.from_directory(packed_dir).tensors)
    flip_a_bit(weights_of(packed_dir))
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        unpack_checkpoint(packed_dir, tmp_path / "again")


def test_another_file_of_the_same_size_moved_into_place_is_checked(packed_dir, cache):
    load(packed_dir)
    file, other = weights_of(packed_dir), packed_dir.parent / "other.safetensors"
    shutil.copy2(file, other)
    flip_a_bit(other)
    os.replace(other, file)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        load(packed_dir)


def test_a_file_of_another_model_beside_remembered_ones_is_told(packed_dir, cache, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        model = load(packed_dir)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Embedding):
                    module.weight.add_(seed)
            model.model.layers[0].self_attn.q_proj.compressed.mul_(1 + seed)
        save_base(model, folder, max_shard_size="20KB")
    load(folders[0])
    load(folders[0])
    names = sorted(file.name for file in folders[0].glob("*.safetensors"))
    assert len(names) > 2
    shutil.copy(folders[1] / names[-1], folders[0])
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        load(folders[0])


def test_a_weight_whose_parts_lie_in_two_files_is_checked_when_either_changes(cache, tmp_path):
    def write(width: int) -> None:
        others = {"l.compressed": torch.ones(1, width // 2), "l.shape": torch.tensor([1, width])}
        save_file(others, tmp_path / "b.safetensors")

    bits = torch.tensor([[0b00110011, 0b00000011]], dtype=torch.uint8)  # two bytes of a row of 12 or of 16
    save_file({"l.bitmask": bits}, tmp_path / "a.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    write(12)
    FileChecks(Checkpoint.from_files(files), False).finish()
    write(16)
    with pytest.raises(CheckpointError, match="columns 12 to 15"):
        FileChecks(Checkpoint.from_files(files), False).finish()


def test_links_lead_to_the_file_that_is_remembered(packed_dir, cache, checked, tmp_path):
    file = weights_of(packed_dir)
    blob, snapshot = tmp_path / "blobs" / "0123", tmp_path / "snapshot"
    shutil.copytree(packed_dir, snapshot)
    blob.parent.mkdir()
    os.replace(snapshot / file.name, blob)
    (snapshot / file.name).symlink_to(blob)
    load(snapshot)
    checked.clear()
    load(snapshot)
    assert not checked
    flip_a_bit(blob)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        load(snapshot)
    (snapshot / file.name).unlink()
    (snapshot / file.name).symlink_to(file)  # another blob, never checked
    load(snapshot)
    assert checked


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\udcff", "[" * 100_000, "version", "checks", "ctime_ns"])
def test_a_damaged_or_foreign_record_is_not_believed_and_written_anew(packed_dir, cache, checked, damage):
    load(packed_dir)
    (record,) = records(cache)
    whole = record.read_text()
    fields = json.loads(whole)
    text = json.dumps({**fields, damage: 0}) if damage in fields else damage
    record.write_bytes(text.encode(errors="surrogateescape"))
    checked.clear()
    load(packed_dir)
    assert checked
    assert records(cache)[0].read_text() == whole


def test_a_record_that_others_can_write_or_that_is_old_is_not_believed(packed_dir, cache, checked):
    load(packed_dir)
    (record,) = records(cache)
    for change in (
        lambda: record.chmod(0o666),
        lambda: os.utime(record, (0, time.time() - 8 * 24 * 3600)),
        lambda: os.utime(record, (0, time.time() + 3600)),
        lambda: cache.chmod(0o777),
    ):
        change()
        checked.clear()
        load(packed_dir)
        assert checked


def test_old_records_go_away(packed_dir, cache):
    cache.mkdir(parents=True, mode=0o700)
    old = cache / f"checked-{'0' * 32}.json"
    old.write_text("{}")
    os.utime(old, (0, 0))
    (cache / "products-0.so").touch()
    os.utime(cache / "products-0.so", (0, 0))
    load(packed_dir)
    assert not old.exists()
    assert (cache / "products-0.so").exists()
    assert len(records(cache)) == 1


def test_a_file_that_was_just_written_is_not_remembered(packed_dir, cache, checked, monkeypatch):
    monkeypatch.setattr(module, "_SETTLED_NANOSECONDS", 60_000_000_000)
    weights_of(packed_dir).touch()
    for _ in range(2):
        load(packed_dir)
        assert checked
        checked.clear()
    assert not records(cache)


@pytest.mark.parametrize("remembered", [False, True])
def test_a_file_that_changes_while_it_is_loaded(packed_dir, cache, checked, monkeypatch, remembered):
    if remembered:
        load(packed_dir)
    finish = module.FileChecks.finish

    def change_and_finish(self):
        flip_a_bit(weights_of(packed_dir)) if remembered else weights_of(packed_dir).chmod(0o600)
        finish(self)

    monkeypatch.setattr(module.FileChecks, "finish", change_and_finish)
    if remembered:
        with pytest.raises(CheckpointError, match="do not match their checksum"):
            load(packed_dir)
    else:
        load(packed_dir)
        assert not records(cache)


def test_the_switch_checks_always(packed_dir, cache, checked, monkeypatch):
    load(packed_dir)
    (record,) = records(cache)
    before = record.stat()
    monkeypatch.setenv(SWITCH, "0")
    for _ in range(2):
        checked.clear()
        load(packed_dir)
        assert checked
    assert record.stat() == before


def test_a_cache_that_cant_be_written_is_no_error(packed_dir, cache, checked, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, where a folder has to be")
    for _ in range(2):
        checked.clear()
        load(packed_dir)
        assert checked
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    load(packed_dir)


def test_each_file_of_a_checkpoint_is_remembered_by_itself(packed_dir, cache, checked, tmp_path):
    folder = tmp_path / "sharded"
    load(packed_dir).save_pretrained(folder, max_shard_size="10KB")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    load(folder)
    assert len(records(cache)) == 1 + len(files)
    os.utime(files[1])
    checked.clear()
    load(folder)
    of_file = {name for name, stored in Checkpoint.from_directory(folder).tensors.items() if stored.file == files[1]}
    assert {name for name in checked if not name.endswith("weight")} == {
        name for name in of_file if not name.endswith("weight")
    }


@pytest.mark.slow
def test_two_processes_at_once(packed_dir, cache, checked):
    script = f"import peft_variator; peft_variator.load_base({str(packed_dir)!r})"
    time.sleep(2.1)
    runs = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    assert [entry.name for entry in cache.iterdir()] == [file.name for file in records(cache)]
    load(packed_dir)
    assert not checked
