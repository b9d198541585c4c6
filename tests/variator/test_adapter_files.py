"""Adapter files that are not what they should be: refused with the key, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_variator import VariatorConfig, load_plugin

from .cases import BERT, outputs_of


File = dict[str, Tensor]
SCORER = "base_model.model.encoder.layer.0.intermediate.variator_scorer.weight"
BASE = "base_model.model.encoder.layer.0.attention.self.query.weight"


def smuggle(file: File) -> str:
    file[BASE] = torch.zeros(32, 32)
    return "attention.self.query.weight"


def not_a_number(file: File) -> str:
    file[SCORER][0, 3] = torch.nan
    return "variator_scorer"


def integers(file: File) -> str:
    file[SCORER] = file[SCORER].round().to(torch.int32)
    return "variator_scorer"


def surplus(file: File) -> str:
    file["base_model.model.encoder.layer.7.intermediate.variator_scorer.weight"] = file[SCORER].clone()
    return "encoder.layer.7"


def missing(file: File) -> str:
    del file[SCORER]
    return "encoder.layer.0.intermediate.variator_scorer"


def renamed(file: File) -> str:
    file[SCORER.replace("scorer", "score")] = file.pop(SCORER)
    return "variator_score"


def wrong_shape(file: File) -> str:
    file[SCORER] = torch.zeros(1, 31)
    return "variator_scorer"


DAMAGES = [smuggle, not_a_number, integers, surplus, missing, renamed, wrong_shape]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    get_peft_model(BERT.build(), VariatorConfig(init_weights=False)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "load_plugin"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_refused(damage: Callable[[File], str], how: str, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    file = load_file(path)
    key = damage(file)
    save_file(file, path)
    base = BERT.build()
    if how == "load_adapter":
        model = get_peft_model(base, VariatorConfig(init_weights=False)).eval()
        before = next(iter(outputs_of(model, BERT.inputs()).values()))
        with pytest.raises(ValueError, match=key):
            model.load_adapter(str(folder), "second")
        assert list(model.peft_config) == ["default"]
        assert torch.equal(next(iter(outputs_of(model, BERT.inputs()).values())), before)
        return
    with pytest.raises(ValueError, match=key):
        load_plugin(base, folder) if how == "load_plugin" else PeftModel.from_pretrained(base, str(folder))
    expected = next(iter(outputs_of(BERT.build(), BERT.inputs()).values()))
    assert torch.equal(next(iter(outputs_of(base, BERT.inputs()).values())), expected)
    assert all("forward" not in vars(module) for module in base.modules())


def test_the_state_of_the_whole_model_still_loads(folder: Path) -> None:
    """As trainers keep it that save everything."""
    from peft import set_peft_model_state_dict

    model = PeftModel.from_pretrained(BERT.build(), str(folder)).eval()
    other = get_peft_model(BERT.build(), VariatorConfig())
    set_peft_model_state_dict(other, model.state_dict())
    expected = next(iter(outputs_of(model, BERT.inputs()).values()))
    assert torch.equal(next(iter(outputs_of(other.eval(), BERT.inputs()).values())), expected)
