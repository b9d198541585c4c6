"""Values of another kind in config.json: every reader says which file, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_variator.bases import load_base, merge_checkpoint, pack_checkpoint, unpack_checkpoint
from peft_variator.cli.main import app
from peft_variator.model_files import CheckpointError, read_model_config
from peft_variator.models import load_config
from peft_variator.sparsity import inspect_checkpoint

from .models import logits


ODD_FILES = {
    "list": "[1]",
    "text": '"x"',
    "null": "null",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep field": '{"model_type": "llama", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"model_type": "llama", "vocab_size": ' + "1" * 5000 + "}",
    "half": '{"model_type": "lla',
    "bytes": "\udcff",
}
ODD_FIELDS = {
    "hidden_size": [[1], "x", None, 1.5, -3],
    "model_type": [[1], "x"],
    "architectures": ["x", {"a": 1}, 3, [[1]]],
    "dtype": [[1], "x", 3, True, {"a": 1}],
    "hidden_act": ["x", [1]],
    "vocab_size": [-3],
}
CASES = [(name, value) for name, values in ODD_FIELDS.items() for value in values]


ADAPTER = Path(__file__).parents[1] / "fixtures" / "v0_1" / "sparse-lora-weight"


def readers(dense: Path, packed: Path, output: Path):
    """Every function that reads config.json, by name."""
    return {
        "pack": lambda: pack_checkpoint(dense, output),
        "unpack": lambda: unpack_checkpoint(packed, output),
        "merge": lambda: merge_checkpoint(dense, ADAPTER, output),
        "load_base": lambda: load_base(dense),
        "load_base of a packed one": lambda: load_base(packed),
        "inspect": lambda: inspect_checkpoint(dense),
    }


def refused_by_all(dense: Path, packed: Path, tmp_path: Path) -> None:
    for name, read in readers(dense, packed, tmp_path / "out").items():
        with pytest.raises(CheckpointError) as raised:
            read()
        folder = packed if name in ("unpack", "load_base of a packed one") else dense
        assert str(folder / "config.json") in str(raised.value), name
        assert len(str(raised.value)) < 1000
    words = ["prune", dense, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.6"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "config.json" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ODD_FILES.values(), ids=ODD_FILES)
def test_files_that_hold_no_config(dense_dir, packed_dir, tmp_path, text):
    for folder in (dense_dir, packed_dir):
        (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused_by_all(dense_dir, packed_dir, tmp_path)


@pytest.mark.parametrize(("field", "value"), CASES, ids=str)
def test_fields_with_values_of_another_kind(dense_dir, packed_dir, tmp_path, field, value):
    for folder in (dense_dir, packed_dir):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    refused_by_all(dense_dir, packed_dir, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("targets", [-1]),
        ("targets", "Linear"),
        ("ignore", 1),
        ("ignore", "lm_head"),
        ("format", [1]),
        ("unpacked", {"a": 1}),
        ("checksums", "no"),
    ],
    ids=str,
)
def test_sparsity_fields_with_values_of_another_kind(packed_dir, tmp_path, field, value):
    path = packed_dir / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity_config"][field] = value
    path.write_text(json.dumps(config))
    for read in (
        lambda: load_base(packed_dir),
        lambda: unpack_checkpoint(packed_dir, tmp_path / "out"),
        lambda: merge_checkpoint(packed_dir, ADAPTER, tmp_path / "out"),
        lambda: AutoModelForCausalLM.from_pretrained(packed_dir),
    ):
        with pytest.raises(ValueError, match=field):
            read()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["x", 3, [1]], ids=str)
def test_a_sparsity_config_that_is_no_dict(packed_dir, value):
    path = packed_dir / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["sparsity_config"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sparsity_config"):
        load_base(packed_dir)


@pytest.mark.parametrize("weight_map", [0, None, {"lm_head.weight": 3}, {"lm_head.weight": [1]}], ids=str)
def test_an_index_of_another_kind(dense_dir, packed_dir, weight_map):
    for folder in (dense_dir, packed_dir):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load_base(folder)


@pytest.mark.parametrize("name", ["Trainer", "LlamaConfig", "AutoModel", "PreTrainedModel", "logging"])
def test_architectures_that_are_no_models(dense_dir, tmp_path, name):
    path = dense_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}))
    with pytest.raises(CheckpointError, match=name):
        pack_checkpoint(dense_dir, tmp_path / "out")
    assert name in inspect_checkpoint(dense_dir).source["reason"]
    load_base(dense_dir)  # AutoModelForCausalLM says which class


def test_the_folder_of_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for name, read in readers(tmp_path, tmp_path, tmp_path / "out").items():
        if name not in ("inspect", "merge"):
            with pytest.raises(CheckpointError, match="adapter.*'org/base'"):
                read()


def test_files_of_a_config_alone_and_names_on_the_hub(dense_dir):
    assert load_config(str(dense_dir / "config.json")).model_type == "llama"
    with pytest.raises(FileNotFoundError):
        read_model_config(dense_dir / "nowhere")
    with pytest.raises(OSError):  # noqa: PT011 (what transformers says depends on whether it may ask the Hub)
        read_model_config("nobody/nothing")


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size"])
def test_a_size_that_config_json_lacks_is_named(packed_dir, field):
    path = packed_dir / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != field}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*config\.json.*{field}="):
        load_base(packed_dir)


def test_load_base_reads_a_packed_folder_that_lost_its_quantization_config(packed_dir):
    expected = logits(load_base(packed_dir))
    path = packed_dir / "config.json"
    fields = {key: value for key, value in json.loads(path.read_text()).items() if key != "quantization_config"}
    path.write_text(json.dumps(fields))
    torch.testing.assert_close(logits(load_base(packed_dir)), expected)
