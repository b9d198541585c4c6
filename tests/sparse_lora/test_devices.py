"""Several processes, and base weights that are not in memory."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import attach_masks
from tests.processes import run_processes

from .cases import CASES, build, outputs, random_masks, randomize_
from .test_stored import target_names


BERT = CASES["bert"]
QUERY = "bert.encoder.layer.0.attention.self.query"


def make(mask: str):
    model = get_peft_model(build("bert", pruned=mask == "weight"), SparseLoraConfig(mask=mask))
    if mask == "stored":
        attach_masks(model, random_masks(build("bert"), target_names("bert")))
    return randomize_(model)


def gradients(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model(input_ids=tokens).logits.square().sum(dim=1).mean().backward()
    return {
        name.removeprefix("module."): value.grad for name, value in model.named_parameters() if value.requires_grad
    }


def _one_process(rank: int, directory: str) -> None:
    tokens = BERT.inputs["input_ids"][rank : rank + 1]
    for mask in ("weight", "stored"):
        torch.save(gradients(DistributedDataParallel(make(mask)), tokens), f"{directory}/{mask}-{rank}.pt")


def test_two_processes_give_the_gradients_of_the_whole_batch(tmp_path) -> None:
    run_processes(_one_process, str(tmp_path))
    for mask in ("weight", "stored"):
        expected = gradients(make(mask), BERT.inputs["input_ids"])
        for rank in range(2):
            found = torch.load(tmp_path / f"{mask}-{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def offload(model, where: str, directory) -> None:
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, directory, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("mask", ["weight", "stored"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_everything_offloaded_is_brought_in_for_a_forward(where: str, mask: str, tmp_path) -> None:
    model = make(mask)
    with torch.no_grad():
        expected = outputs(model, BERT)
        offload(model.get_base_model(), where, tmp_path)
        query = model.get_base_model().get_submodule(QUERY)
        assert query.get_base_layer().weight.is_meta
        assert query.sparse_low_rank_A["default"].is_meta
        assert torch.equal(outputs(model, BERT), expected)
        assert query.get_base_layer().weight.is_meta


def test_offloaded_masks_are_brought_in_too() -> None:
    model = make("stored")
    query = model.get_base_model().get_submodule(QUERY)
    with torch.no_grad():
        expected, mask = outputs(model, BERT), query.get_mask("default")
        cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"), offload_buffers=True)
        assert query.sparse_low_rank_mask["default"].is_meta
        assert torch.equal(outputs(model, BERT), expected)
        assert torch.equal(query.get_mask("default"), mask)
    with pytest.raises(ValueError, match=rf"stored masks of '{QUERY}' are offloaded"):
        query.attach_mask("default", ~mask)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, BERT), expected)


@pytest.mark.parametrize("mask", ["weight", "stored"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_adapter_is_loaded_on_an_offloaded_base(where: str, mask: str, tmp_path) -> None:
    model = make(mask)
    model.save_pretrained(tmp_path)
    base = build("bert", pruned=mask == "weight")
    offload(base, where, tmp_path / "offloaded")
    loaded = PeftModel.from_pretrained(base, tmp_path)
    query = base.get_submodule(QUERY)
    assert query.get_base_layer().weight.is_meta
    assert query.sparse_low_rank_A["default"].device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(outputs(loaded, BERT), outputs(model, BERT))
    assert torch.equal(query.get_mask("default"), model.get_base_model().get_submodule(QUERY).get_mask("default"))


def test_a_stored_mask_is_checked_against_an_offloaded_base(tmp_path) -> None:
    make("stored").save_pretrained(tmp_path)
    torch.manual_seed(1)
    base = BERT.build()
    cpu_offload(base, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="was made for another base"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_saved_adapter_is_not_loaded_by_transformers_on_a_base_partly_on_disk(is_trainable: bool, tmp_path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    randomize_(get_peft_model(base, SparseLoraConfig())).save_pretrained(tmp_path / "adapter")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = type(base).from_pretrained(tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        expected = outputs(model, CASES["llama"])
        with pytest.raises(ValueError, match="partly offloaded to disk"):
            model.load_adapter(str(tmp_path / "adapter"), is_trainable=is_trainable)
        assert torch.equal(outputs(model, CASES["llama"]), expected)
