"""What can't be merged is refused before anything is written; interrupted merges; memory; the command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForSequenceClassification, LlamaForCausalLM
from typer.testing import CliRunner

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.bases import CheckpointError, checkpoint, merge_checkpoint, save_base
from peft_variator.cli.main import app

from .adapters import save_adapter
from .models import contents, logits, tiny_bert, tiny_llama
from .reference import same_bits, two_four


NAME = "base_model.model.model.layers.0.mlp.up_proj.sparse_low_rank_"


@pytest.fixture
def adapter(tmp_path) -> Path:
    return save_adapter(tiny_llama(), SparseLoraConfig(r=4), tmp_path / "adapter")


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, or with None remove, tensors of an adapter."""
    file = folder / "adapter_model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def refuses(base: Path, adapter: Path, match: str, packed: bool | None = None) -> None:
    """Merging raises, and writes nothing."""
    before = contents(base), contents(adapter)
    with pytest.raises(CheckpointError, match=match):
        merge_checkpoint(base, adapter, base.parent / "refused", packed)
    assert not (base.parent / "refused").exists()
    assert (contents(base), contents(adapter)) == before


def test_adapters_of_other_methods(dense_dir, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(tiny_llama(), lora, tmp_path / "lora")
    for packed in (True, False):
        refuses(dense_dir, adapter, r"peft_type='LORA', but only .* update fills the zeros .*merge_and_unload", packed)
    plugin = save_adapter(tiny_llama(), VariatorConfig(compression_ratio=2, bottleneck_dim=4), tmp_path / "plugin")
    refuses(dense_dir, plugin, r"adapter_config\.json: peft_type='VARIATOR'.*Load it above the base")


def test_folders_that_hold_no_adapter(dense_dir, adapter, tmp_path):
    refuses(dense_dir, dense_dir, r"adapter_config\.json can't be read as the config of an adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refuses(dense_dir, adapter, r"has no adapter_model\.safetensors\. Save the adapter with save_pretrained")
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    refuses(dense_dir, adapter, r"adapter_model\.safetensors can't be read as a safetensors file")
    (adapter / "adapter_config.json").write_text("[]")
    refuses(dense_dir, adapter, r"adapter_config\.json holds \[\]")


def test_tensors_that_are_missing_or_of_another_kind(dense_dir, adapter):
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    for change, match in (
        ({f"{NAME}A": None}, r"model\.layers\.0\.mlp\.up_proj\.sparse_low_rank_A missing, which an adapter of this"),
        ({f"{NAME}A": torch.zeros(3, 32)}, rf"{NAME}A is torch\.float32 \(3, 32\), but above Llama.* \(4, 32\)"),
        ({f"{NAME}B": torch.zeros(44, 4).int()}, rf"{NAME}B is torch\.int32 \(44, 4\), but above Llama"),
        (
            {"base_model.model.score.weight": torch.zeros(2, 32)},
            r"base_model\.model\.score\.weight has no place in Ll",
        ),
        (
            {"base_model.model.lm_head.weight": torch.zeros(65, 32)},
            r"\(65, 32\), but lm_head\.weight .* has \(64, 32\)",
        ),
        (
            {f"{NAME}B": torch.full((44, 4), torch.inf)},
            rf"{NAME}A: the merged weight of model\.layers\.0\.mlp\.up_proj",
        ),
    ):
        change_tensors(adapter, **change)
        refuses(dense_dir, adapter, match)
        (adapter / "adapter_model.safetensors").write_bytes(whole)


def test_an_adapter_of_another_model(dense_dir, tmp_path):
    adapter = save_adapter(tiny_llama(width=64), SparseLoraConfig(r=4), tmp_path / "wide")
    refuses(
        dense_dir, adapter, r"q_proj\.sparse_low_rank_A is torch\.float32 \(4, 64\), .* it is torch\.float32 \(4, 32\)"
    )
    adapter = save_adapter(tiny_bert(), SparseLoraConfig(r=4), tmp_path / "bert")
    refuses(dense_dir, adapter, r"does not fit LlamaForCausalLM: .*not found in the base model")
    deep = save_adapter(
        LlamaForCausalLM(tiny_llama().config.__class__(**{**tiny_llama().config.to_dict(), "num_hidden_layers": 3})),
        SparseLoraConfig(r=4, target_modules=["q_proj"]),
        tmp_path / "deep",
    )
    refuses(dense_dir, deep, r"layers\.2\.self_attn\.q_proj\.sparse_low_rank_A, .* has no place in LlamaForCausalLM")


def test_a_new_head_that_the_base_does_not_have(tmp_path):
    model = tiny_bert()
    model.bert.save_pretrained(tmp_path / "encoder")
    adapter = save_adapter(
        model, SparseLoraConfig(r=2, modules_to_save=["classifier"], task_type="SEQ_CLS"), tmp_path / "adapter"
    )
    refuses(tmp_path / "encoder", adapter, r"does not fit BertModel: .* save the base once with that head")
    BertForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=3).save_pretrained(
        tmp_path / "base"
    )
    assert merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged").replaced == 2


def test_a_base_that_lacks_a_target(dense_dir, adapter):
    file = dense_dir / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file)
    refuses(dense_dir, adapter, r"has no tensor for model\.layers\.1\.mlp\.up_proj\.weight, which the adapter in")
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": weight[:40].clone()}, file)
    refuses(dense_dir, adapter, r"stores a weight of shape \(40, 32\), but the adapter's .*up_proj is \(44, 32\)")


def test_a_trained_head_that_is_tied(tmp_path):
    tied = tiny_llama(tie=True)
    tied.save_pretrained(tmp_path / "base")
    config = SparseLoraConfig(r=2, target_modules=["q_proj"])
    adapter = save_adapter(tied, config, tmp_path / "adapter")
    change_tensors(adapter, **{"base_model.model.lm_head.weight": torch.zeros(64, 32)})
    refuses(tmp_path / "base", adapter, r"lm_head\.weight: it replaces .*embed_tokens.*tie_word_embeddings=False")


@pytest.mark.filterwarnings("ignore:Nothing is masked")
def test_masks_of_another_base_or_none(tmp_path):
    model, other = tiny_llama(), tiny_llama()
    other.model.layers[1].mlp.down_proj.weight.data *= 1.1
    other.save_pretrained(tmp_path / "other")
    masks = {"model.layers.1.mlp.down_proj": model.model.layers[1].mlp.down_proj.weight != 0}
    config = SparseLoraConfig(r=2, mask="stored", target_modules=list(masks))
    adapter = save_adapter(model, config, tmp_path / "adapter", masks)
    refuses(tmp_path / "other", adapter, r"mask: the mask was made for another base: the weight of .*down_proj is not")
    adapter = save_adapter(model, config, tmp_path / "empty")
    for packed in (True, False):
        refuses(tmp_path / "other", adapter, r"saved before it had masks\. Call attach_masks", packed)


def test_nothing_to_pack(tmp_path):
    model = LlamaForCausalLM(tiny_llama().config)
    for parameter in model.parameters():
        parameter.data.view(-1)[0] = 0
    model.save_pretrained(tmp_path / "base")
    adapter = save_adapter(model, SparseLoraConfig(r=2), tmp_path / "adapter")
    refuses(tmp_path / "base", adapter, r"no linear layer of LlamaForCausalLM is 2:4 .* Merge to the dense form", True)


def test_damaged_bases_and_taken_outputs(dense_dir, packed_dir, adapter):
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        merge_checkpoint(dense_dir, adapter, packed_dir)
    data = bytearray((packed_dir / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (packed_dir / "model.safetensors").write_bytes(data)
    refuses(packed_dir, adapter, r"values do not match their checksum")


class Killed(BaseException):
    """Stands for a process that ends: nothing of ours catches it."""


def test_an_interrupted_merge_is_taken_up_and_only_by_the_same_merge(tmp_path, adapter, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    other = save_adapter(tiny_llama(), SparseLoraConfig(r=4), tmp_path / "other", seed=1)
    for name, one in (("whole", adapter), ("whole-other", other)):
        merge_checkpoint(tmp_path / "base", one, tmp_path / name, packed=True)
    write, written = checkpoint.ShardWriter.write, []

    def dying(self, name, tensor):
        if "layers.1" in name:
            raise Killed
        write(self, name, tensor)

    for again, wanted in ((adapter, "whole"), (other, "whole-other")):
        monkeypatch.setattr(checkpoint.ShardWriter, "write", dying)
        with pytest.raises(Killed):
            merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged", packed=True)
        assert not (tmp_path / "merged").exists()
        kept = len(list((tmp_path / ".merged.partial").glob("*.safetensors")))
        assert kept > 0
        written.clear()
        monkeypatch.setattr(
            checkpoint.ShardWriter,
            "write",
            lambda self, name, tensor: written.append(name) or write(self, name, tensor),
        )
        merge_checkpoint(tmp_path / "base", again, tmp_path / "merged", packed=True)
        assert contents(tmp_path / "merged") == contents(tmp_path / wanted)
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
        assert (len(written) < len(index)) == (again == adapter)
        shutil.rmtree(tmp_path / "merged")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Twelve tensors of 4 MB, in one file: the memory in use stays under that of six of them."""
    config = tiny_llama().config.__class__(
        vocab_size=8, hidden_size=1024, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    parts = ("up_proj", "gate_proj", "down_proj")
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in parts:
            parameter.data = two_four(1024, 1024)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, SparseLoraConfig(r=4, target_modules=list(parts)), tmp_path / "adapter")
    del model, parameter
    process, used = psutil.Process(), []
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "warm")
    before = process.memory_info().rss
    for packed in (True, False):
        merge_checkpoint(
            tmp_path / "base",
            tmp_path / "adapter",
            tmp_path / f"merged-{packed}",
            packed,
            lambda *_: used.append(process.memory_info().rss - before),
        )
    assert len(used) > 50
    assert max(used) < 6 * 4 * 1024**2


def run(*arguments: str):
    return CliRunner().invoke(app, ["merge", *arguments])


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--packed", "14 packed layers"),
        pytest.param("--dense", "is dense", marks=pytest.mark.slow),
        (None, "is dense"),
    ],
)
def test_the_command(dense_dir, adapter, tmp_path, flag, words):
    result = run(str(dense_dir), str(adapter), "--output", str(tmp_path / "merged"), *([flag] if flag else []))
    assert result.exit_code == 0, result.output
    assert "Merged 14 weights under their masks; the result" in result.output
    assert words in result.output
    assert f"from_pretrained('{tmp_path / 'merged'}')" in result.output
    assert ("import peft_variator" in result.output) == (flag == "--packed")
    assert merge_checkpoint(dense_dir, adapter, tmp_path / "again", flag == "--packed").merged == 14
    assert contents(tmp_path / "again") == contents(tmp_path / "merged")


@pytest.fixture
def unpruned_dir(dense_dir, tmp_path):
    """The base of `dense_dir` before it was pruned."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama().config).save_pretrained(tmp_path / "unpruned")
    return tmp_path / "unpruned"


@pytest.mark.parametrize("packed", [None, False, True])
def test_a_base_in_which_nothing_is_masked(adapter, unpruned_dir, tmp_path, packed):
    with pytest.raises(CheckpointError, match=r"model\S+_proj\.weight"):
        merge_checkpoint(unpruned_dir, adapter, tmp_path / "merged", packed)
    assert not list(tmp_path.glob("*merged*"))


def test_the_command_says_where_nothing_was_masked(dense_dir, adapter, unpruned_dir, tmp_path):
    result = run(str(dense_dir), str(adapter), "-o", str(tmp_path / "pruned"))
    assert "Nothing was masked" not in result.output
    partly = load_file(unpruned_dir / "model.safetensors")
    partly["model.layers.0.mlp.up_proj.weight"] = load_file(dense_dir / "model.safetensors")[
        "model.layers.0.mlp.up_proj.weight"
    ]
    save_file(partly, unpruned_dir / "model.safetensors", {"format": "pt"})
    base = LlamaForCausalLM.from_pretrained(unpruned_dir)
    adapter = save_adapter(base, SparseLoraConfig(r=4), tmp_path / "above the partly pruned one")
    result = run(str(unpruned_dir), str(adapter), "-o", str(tmp_path / "whole"))
    assert result.exit_code == 0, result.output
    assert re.search(r"Nothing was masked in 13 of them, the first being model\S+_proj\.weight: ", result.output)
    assert result.output.index("Nothing was masked") < result.output.index("Next: ")


def test_the_command_reports_errors(dense_dir, adapter, tmp_path):
    result = run(str(dense_dir), str(tmp_path / "nowhere"), "-o", str(tmp_path / "merged"))
    assert result.exit_code == 1
    assert "adapter_config.json can't be read" in result.output
    assert not (tmp_path / "merged").exists()


def test_saving_appears_whole(packed_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed_dir)
    save_base(model, tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    with pytest.raises(FileExistsError, match="already exists"):
        save_base(model, tmp_path / "saved")


def test_a_base_that_was_pruned_otherwise(dense_dir, adapter, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "other")
    tensors = load_file(dense_dir / "model.safetensors")
    tensors = {name: tensor.flip(0) if "mlp" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    refuses(tmp_path / "other", adapter, "base_fingerprint")


def test_base_and_adapter_swapped(dense_dir, adapter):
    with pytest.raises(CheckpointError, match="swapped"):
        merge_checkpoint(adapter, dense_dir, dense_dir.parent / "refused")
