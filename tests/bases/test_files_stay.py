"""Nothing that is done with a base changes its files: PEFT rewrites those of one that is offloaded to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_variator import SparseLoraConfig, load_plugin
from peft_variator.bases import merge_checkpoint, pack_checkpoint, save_base, unpack_checkpoint

from .adapters import randomize, save_adapter
from .models import ON_DISK, contents, logits, tiny_llama
from .reference import same_bits
from .test_adapters import CONFIGS


OURS = ["sparse_lora", "variator"]


@pytest.fixture
def workplace(dense_dir, packed_dir, tmp_path, monkeypatch) -> Path:
    """`dense`, `packed`, and an adapter of each method. Relative paths lead here: PEFT writes to those."""
    for method, config in CONFIGS.items():
        save_adapter(tiny_llama(), config, tmp_path / method)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_disk(folder: str | Path, offload: Path | None = None):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=ON_DISK, offload_folder=offload)


@pytest.mark.parametrize("base", ["dense", "packed"])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("method", OURS)
def test_peft_is_stopped_before_it_rewrites_the_base(workplace, base, absolute, method):
    before = contents(workplace)
    folder = workplace / base if absolute else base
    with pytest.raises(ValueError, match=r"to disk, .*stopped before it wrote anything.*Load the model"):
        PeftModel.from_pretrained(on_disk(folder), method)
    with pytest.raises(ValueError, match="partly offloaded to disk"):
        PeftModel.from_pretrained(on_disk(folder, workplace / base), method, offload_folder=str(workplace / base))
    assert contents(workplace) == before


@pytest.mark.parametrize("absolute", [True, False])
def test_a_lora_of_pefts_own_is_stopped_above_packed_layers(workplace, absolute):
    before = contents(workplace)
    with pytest.raises(ValueError, match="stopped before it wrote anything"):
        PeftModel.from_pretrained(on_disk(workplace / "packed" if absolute else "packed"), "lora")
    assert contents(workplace) == before


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_the_auto_classes_are_stopped_too(workplace, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, SparseLoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained("named")
    before = contents(workplace)
    with pytest.raises(ValueError, match="stopped before it wrote anything"):
        AutoPeftModelForCausalLM.from_pretrained("named", device_map=ON_DISK)
    assert contents(workplace) == before


def test_loading_a_plugin_is_refused_without_touching_the_model(workplace):
    before = contents(workplace)
    model = on_disk("packed")
    with pytest.raises(ValueError, match="partly offloaded to disk"):
        load_plugin(model, "variator")
    assert same_bits(logits(model), logits(tiny_llama()))
    assert contents(workplace) == before


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_everything_else_leaves_the_base_as_it_is(workplace, base):
    before = contents(workplace / base), contents(workplace / "sparse_lora")
    model = on_disk(workplace / base)
    adapted = get_peft_model(model, SparseLoraConfig(r=2)).eval()
    randomize(adapted)
    logits(adapted)
    adapted.save_pretrained(workplace / "saved")
    merged = adapted.merge_and_unload()
    logits(merged)
    in_memory = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "sparse_lora").merge_and_unload()
    save_base(in_memory, workplace / "in-memory")
    if base == "dense":
        pack_checkpoint(base, workplace / "other")
    else:
        unpack_checkpoint(base, workplace / "other")
    merge_checkpoint(base, "sparse_lora", workplace / "merged")
    on_files = AutoModelForCausalLM.from_pretrained(workplace / "merged")
    assert same_bits(logits(on_files), logits(AutoModelForCausalLM.from_pretrained(workplace / "in-memory")))
    assert (contents(workplace / base), contents(workplace / "sparse_lora")) == before
