"""Every private name that the package takes of another library exists, and setup.cfg bounds these libraries above."""

import ast
import configparser
import functools
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from accelerate import cpu_offload
from packaging.requirements import Requirement
from peft import PeftConfig, PeftModel, PeftType
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


def private_names(source):
    """What a module takes of `LIBRARIES` that starts with an underscore, as `line: name`."""
    tree, roots, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken = [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            taken = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        else:
            continue
        for bound, name in taken:
            if name.partition(".")[0] in LIBRARIES:
                roots[bound] = name
                found.append((node.lineno, name))
    for node in ast.walk(tree):
        parts, root = [], node
        while isinstance(root, ast.Attribute):
            parts.append(root.attr)
            root = root.value
        if parts and isinstance(root, ast.Name) and root.id in roots:
            found.append((node.lineno, ".".join([root.id, *reversed(parts)])))
    private = {
        f"{line}: {name}"
        for line, name in found
        if any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    }
    return sorted(private)


def test_a_private_name_is_found_however_it_is_taken():
    assert private_names("import torch\nx = torch._C._x()\ny = torch.ones") == ["2: torch._C", "2: torch._C._x"]
    assert private_names("from peft.tuners._dict import B as A") == ["1: peft.tuners._dict.B"]
    assert private_names("import torch.x._y as z") == ["1: torch.x._y"]
    assert private_names("from transformers import _y, Trainer as _z") == ["1: transformers._y"]
    assert private_names("from . import _mine\nimport torch\nprint(torch.__version__)") == []


def test_private_names_stand_in_one_file():
    package = ROOT / "peft_variator"
    found = {
        str(path.relative_to(package)): names
        for path in package.rglob("*.py")
        if path.name != "compat.py" and (names := private_names(path.read_text()))
    }
    assert found == {}


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


def put_around(loader):
    @functools.wraps(loader)
    def wrapper(*args, **kwargs):
        return loader(*args, **kwargs)

    return wrapper


def test_how_peft_renames_keys_is_told_while_it_loads(monkeypatch):
    """Also below what other programs put around PEFT's functions."""
    assert compat.key_mapping_while_loading() is None
    told = []

    def look(*args, **kwargs):
        told.append(compat.key_mapping_while_loading())
        raise InterruptedError

    monkeypatch.setattr(PeftConfig, "_get_peft_type", look)
    for wrap in (lambda loader: loader, put_around):
        monkeypatch.setattr(PeftModel, "load_adapter", wrap(PeftModel.load_adapter))
        with pytest.raises(InterruptedError):
            PeftModel.load_adapter(SimpleNamespace(peft_config={}, _split_kwargs=lambda k: (k, k)), "x", "default")
        with pytest.raises(InterruptedError):
            PeftModel.load_adapter(
                SimpleNamespace(peft_config={}, _split_kwargs=lambda k: (k, k)), "x", "default", key_mapping={"a": "b"}
            )
    assert told == [{}, {"a": "b"}] * 2


@pytest.mark.parametrize("other", [lambda self, model_id, **kwargs: None, functools.partial(print)])
def test_a_peft_that_loads_in_another_way_is_refused(monkeypatch, other):
    monkeypatch.setattr(PeftModel, "load_adapter", other)
    with pytest.raises(RuntimeError, match="key_mapping"):
        compat.key_mapping_while_loading()
