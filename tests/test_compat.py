"""Every private name that the package takes of another library exists, and setup.cfg bounds these libraries above."""

import configparser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from accelerate import cpu_offload
from packaging.requirements import Requirement
from peft import PeftType
from torch import nn
from transformers import BertConfig, BertModel

from peft_variator import compat


ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["accelerate", "peft", "torch", "transformers"]


def requirements():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = map(Requirement, config["options"]["install_requires"].split("\n")[1:])
    return {requirement.name: requirement.specifier for requirement in found}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_with_private_names_is_bounded_above(library):
    specifier = requirements()[library]
    assert any(part.operator == "<" for part in specifier)
    assert specifier.contains(version(library).partition("+")[0])


@pytest.mark.parametrize("name", compat.__all__)
def test_every_name_is_documented(name):
    assert getattr(compat, name).__doc__ or name in compat.__doc__


def test_a_peft_type_is_added_once():
    before = list(PeftType)
    assert compat.add_peft_type("VARIATOR") is PeftType("VARIATOR")
    assert list(PeftType) == before


def test_the_hook_of_an_offloaded_module():
    model = nn.Sequential(nn.Linear(2, 2))
    assert compat.offload_hook(model[0]) is None
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert "weight" in compat.offload_hook(model[0]).weights_map


def test_a_model_is_marked_as_being_without_adapters():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    model = BertModel(config)
    assert model._hf_peft_config_loaded is False
    model._hf_peft_config_loaded = True
    compat.mark_without_adapters(model)
    assert model._hf_peft_config_loaded is False


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_that_a_reentrant_checkpoint_repeats(use_reentrant):
    seen = []

    def forward(x):
        seen.append(torch.is_grad_enabled() and compat.repeated_by_reentrant_checkpoint())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=use_reentrant).sum().backward()
    assert seen == [False, use_reentrant]


def test_quantized_tensors_are_told_from_plain_ones():
    assert not compat.is_quantized_tensor(torch.ones(2))
    assert not compat.is_quantized_tensor(nn.Parameter(torch.ones(2)))
