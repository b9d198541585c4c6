"""What earlier versions wrote still loads, and computes what it did."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, T5EncoderModel

from peft_variator.bases import load_base, merge_checkpoint, unpack_checkpoint


FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
INPUT_IDS = load_file(FIXTURES / "inputs.safetensors")["input_ids"]
OUTPUTS = load_file(FIXTURES / "outputs.safetensors")

ADAPTERS = {
    "variator-token": ("variator-token-base", AutoModel),
    "variator-concat": ("variator-concat-base", T5EncoderModel),
    "sparse-lora-weight": ("llama-24-base", AutoModelForCausalLM),
    "sparse-lora-stored": ("llama-dense-base", AutoModelForCausalLM),
}


def output_of(model) -> torch.Tensor:
    """Logits (batch, tokens, vocabulary), or hidden vectors (batch, tokens, width) of a model without a head."""
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS, attention_mask=torch.ones_like(INPUT_IDS))[0]


def check_output(model, name: str) -> None:
    torch.testing.assert_close(output_of(model), OUTPUTS[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_through_peft(name):
    base, auto_class = ADAPTERS[name]
    check_output(PeftModel.from_pretrained(auto_class.from_pretrained(FIXTURES / base), FIXTURES / name), name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_through_transformers(name):
    base, auto_class = ADAPTERS[name]
    model = auto_class.from_pretrained(FIXTURES / base)
    without = output_of(model)
    model.load_adapter(str(FIXTURES / name))
    check_output(model, name)
    assert not torch.allclose(without, OUTPUTS[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_base], ids=["transformers", "load_base"])
def test_packed_base(load):
    check_output(load(FIXTURES / "llama-packed"), "llama-packed")


def test_packed_base_is_the_dense_one_again(tmp_path):
    unpack_checkpoint(FIXTURES / "llama-packed", tmp_path / "dense")
    dense, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "dense", FIXTURES / "llama-24-base")
    )
    assert dense.keys() == original.keys()
    assert all(torch.equal(dense[name], original[name]) for name in original)


def test_adapter_above_the_packed_base():
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "llama-packed")
    check_output(PeftModel.from_pretrained(model, FIXTURES / "sparse-lora-weight"), "sparse-lora-weight")


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("llama-24-base", "sparse-lora-weight"),
        ("llama-packed", "sparse-lora-weight"),
        ("llama-dense-base", "sparse-lora-stored"),
    ],
)
def test_merged_by_file(tmp_path, base, adapter):
    merge_checkpoint(FIXTURES / base, FIXTURES / adapter, tmp_path / "merged")
    check_output(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), adapter)
