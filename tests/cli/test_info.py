"""`peft-variator info`: what it finds in folders. Repositories are in tests/hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, BertConfig, BertModel, LlamaForCausalLM
from typer.testing import CliRunner, Result

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.cli.main import app


FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"


def info(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["info", *map(str, words)])


def figures(*words: str | Path) -> dict[str, Any]:
    done = info(*words, "--json", "-")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=40
    )
    folder = tmp_path_factory.mktemp("base")
    BertModel(config).save_pretrained(folder)
    return folder


def save_plugin(base: Path, folder: Path, **fields: Any) -> PeftModel:
    model = get_peft_model(AutoModel.from_pretrained(base), VariatorConfig(**fields))
    model.save_pretrained(str(folder))
    return model


def test_a_plugin(base: Path, tmp_path: Path) -> None:
    model = save_plugin(base, tmp_path / "plugin", compression_ratio=2, ratio_pattern={"layer.1": 8})
    found = figures(tmp_path / "plugin")
    parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
    total = sum(value.numel() for value in AutoModel.from_pretrained(base).parameters())
    assert (found["kind"], found["method"], found["base"]) == ("adapter", "Variator", str(base))
    assert (found["ratios"], found["trained_ratios"]) == ([2, 8], None)
    assert (found["parameters"], found["base_parameters"]) == (parameters, total)
    assert found["share_of_base"] == pytest.approx(parameters / total)
    assert found["bytes"] == (tmp_path / "plugin" / "adapter_model.safetensors").stat().st_size
    assert found["settings"]["ratio_pattern"] == {"layer.1": 8}
    told = info(tmp_path / "plugin").stdout
    assert f"{parameters:,}" in told
    assert f"{parameters / total:.2%}" in told


def test_trained_ratios_and_what_training_measured(base: Path, tmp_path: Path) -> None:
    save_plugin(base, tmp_path / "plugin", trained_ratios=[4, 2])
    measured = {"flops_base": 1000, "before": {"cosine": 0.1}}
    ratios = [
        {**measured, "ratio": k, "flops_plugin": 1000 - 100 * k, "after": {"cosine": quality}}
        for k, quality in ((2, 0.9), (4, 0.75))
    ]
    record = {"facts": {"ratios": ratios, "data": "notes.txt"}, "log": []}
    (tmp_path / "plugin" / "training.json").write_text(json.dumps(record))
    found = figures(tmp_path / "plugin")
    assert found["trained_ratios"] == [2, 4]
    assert {ratio: row["saved"] for ratio, row in found["flops"].items()} == pytest.approx({"2": 0.2, "4": 0.4})
    assert found["quality"] == {"2": {"cosine": 0.9}, "4": {"cosine": 0.75}}
    told = info(tmp_path / "plugin").stdout
    assert all(word in told for word in ("20.0%", "40.0%", "0.7500", "notes.txt"))


@pytest.mark.parametrize(
    "record",
    [
        [1],
        {"facts": [1]},
        {"facts": {"ratios": [3, {"ratio": 2}], "losses": 3}},
        {"facts": {"ratios": [{"ratio": 2, "flops_base": 0, "flops_plugin": 1, "after": {"cosine": None}}]}},
        {"facts": {"ratios": [{"ratio": 2, "after": [1]}]}},
    ],
)
def test_what_another_program_wrote_is_not_known(base: Path, tmp_path: Path, record: Any) -> None:
    save_plugin(base, tmp_path / "plugin")
    (tmp_path / "plugin" / "training.json").write_text(json.dumps(record))
    config = tmp_path / "plugin" / "adapter_config.json"
    odd = {"trained_ratios": 3, "auto_mapping": "x", "ratio_schedule": {"x": {}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | odd))
    found = figures(tmp_path / "plugin")
    assert found["flops"] is None
    assert not any(found["quality"].values()) if found["quality"] else found["quality"] is None
    assert found["trained_ratios"] is None
    assert "Trained for" in info(tmp_path / "plugin").stdout


@pytest.mark.parametrize(("mask", "rank"), [("stored", 2), ("weight", 3)])
def test_a_sparse_lora_counts_its_parameters_alone(mask: str, rank: int, tmp_path: Path) -> None:
    if mask == "stored":
        folder = FIXTURES / "sparse-lora-stored"
        parameters = 1024
    else:
        folder = tmp_path / "adapter"
        config = SparseLoraConfig(r=rank, target_modules=["q_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained(FIXTURES / "llama-24-base"), config)
        model.save_pretrained(str(folder))
        parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
    found = figures(folder)
    assert (found["method"], found["ratios"], found["parameters"]) == ("SparseLoRA", None, parameters)
    assert (found["settings"]["mask"], found["settings"]["r"]) == (mask, rank)


def test_a_packed_base_and_its_dense_one() -> None:
    packed, dense = figures(FIXTURES / "llama-packed"), figures(FIXTURES / "llama-24-base")
    model = LlamaForCausalLM.from_pretrained(FIXTURES / "llama-24-base")
    total = sum(value.numel() for value in model.parameters())
    assert (packed["kind"], packed["method"], packed["format"]) == ("packed base", "2:4", "sparse-24-bitmask")
    assert (packed["packed_layers"], packed["architecture"]) == (14, "LlamaForCausalLM")
    assert packed["parameters"] == dense["parameters"] == total
    weights = sum(value.numel() for name, value in model.named_parameters() if "_proj" in name)
    # Half of the values, a bit for each weight, and the two sizes of a matrix.
    assert packed["share_of_dense"] == pytest.approx((4 * total - 2 * weights + weights / 8 + 14 * 16) / (4 * total))
    assert (dense["kind"], dense["packed_layers"], dense["share_of_dense"]) == ("model", 0, 1)
    assert "peft_variator" in info(FIXTURES / "llama-packed").stdout


def test_a_folder_of_several(base: Path, tmp_path: Path) -> None:
    model = save_plugin(base, tmp_path / "both", compression_ratio=2)
    model.add_adapter("fast", VariatorConfig(compression_ratio=8))
    model.save_pretrained(str(tmp_path / "both"))
    found = figures(tmp_path / "both")
    assert (found["ratios"], found["adapters"]["fast"]["ratios"]) == ([2], [8])
    assert figures(tmp_path / "both", "--subfolder", "fast")["ratios"] == [8]
    shutil.move(tmp_path / "both" / "fast", tmp_path / "only" / "fast")
    assert figures(tmp_path / "only")["ratios"] == [8]


def test_other_adapters_are_named(base: Path, tmp_path: Path) -> None:
    get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    assert figures(tmp_path)["method"] == "LORA"


def test_a_pickled_adapter_is_not_read(base: Path, tmp_path: Path) -> None:
    save_plugin(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    found = figures(tmp_path)
    assert (found["parameters"], found["share_of_base"]) == (None, None)
    assert found["bytes"] == (tmp_path / "adapter_model.bin").stat().st_size


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"notes.txt": "nothing"}, "adapter_config.json"),
        ({"adapter_config.json": "{"}, "adapter_config.json"),
        ({"adapter_config.json": "[]"}, "adapter_config.json"),
        ({"config.json": "{}", "model.safetensors": "no tensors"}, "model.safetensors"),
    ],
)
def test_folders_that_hold_nothing_whole(files: dict[str, str], named: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    done = info(tmp_path)
    assert done.exit_code == 1
    assert named in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["./nothing"], "./nothing"),
        (["nobody/nothing"], "nobody/nothing"),  # the tests are offline
        ([str(FIXTURES / "inputs.safetensors")], "inputs.safetensors"),
        ([str(FIXTURES / "llama-packed"), "--subfolder", "none"], "none"),
        ([str(FIXTURES / "llama-packed"), "--revision", "main"], "main"),
    ],
)
def test_what_is_not_there(words: list[str], named: str) -> None:
    done = info(*words)
    assert done.exit_code == 1
    assert named in done.stderr
