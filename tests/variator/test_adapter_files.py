"""Adapter files that are not what they should be: refused with the key, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_variator import VariatorConfig, load_plugin
from tests.tiny_models import BERT, TASK_HEADS, outputs_of


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


def without_prefix(file: File) -> str:
    file[SCORER.removeprefix("base_model.model.")] = file.pop(SCORER)
    return "encoder.layer.0.intermediate.variator_scorer"


def eight_bits(file: File) -> str:
    file[SCORER] = file[SCORER].to(torch.float8_e4m3fn)
    return "variator_scorer"


DAMAGES = [smuggle, not_a_number, integers, surplus, missing, renamed, wrong_shape, without_prefix, eight_bits]


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


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-10])
    return path.name


def gone(path: Path) -> str:
    path.unlink()
    return path.name


def without_head(path: Path) -> str:
    save_file({key: value for key, value in load_file(path).items() if "classifier" not in key}, path)
    return "classifier.weight"


def other_head(path: Path) -> str:
    save_file({key.replace("model.classifier", "model.score"): value for key, value in load_file(path).items()}, path)
    return "classifier.weight"


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter", "load_plugin", "load_plugin beside"])
@pytest.mark.parametrize("damage", [cut, gone, without_head, other_head], ids=lambda damage: damage.__name__)
def test_what_fails_before_the_tensors_are_looked_at(damage: Callable[[Path], str], how: str, tmp_path: Path) -> None:
    """PEFT puts an empty plugin in before it opens the file."""
    case = next(case for case in TASK_HEADS if case.name == "bert-sequence")
    config = VariatorConfig(init_weights=False, task_type="SEQ_CLS")
    get_peft_model(case.build(), config).save_pretrained(tmp_path)
    message = damage(tmp_path / "adapter_model.safetensors")
    base = case.build()
    model = base if how in ("from_pretrained", "load_plugin") else get_peft_model(base, config).eval()
    before = outputs_of(model, case.inputs())["logits"]
    names = [name for name, _ in model.named_modules()]
    load = {"from_pretrained": partial(PeftModel.from_pretrained, base)}.get(how, partial(load_plugin, model))
    if how == "load_adapter":
        load = model.load_adapter
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path), "second")
    assert torch.equal(outputs_of(model.eval(), case.inputs())["logits"], before)
    assert [name for name, _ in model.named_modules()] == names
    assert list(getattr(model, "peft_config", {})) == ([] if model is base else ["default"])


def test_a_config_without_tensors_starts_a_new_plugin(tmp_path: Path) -> None:
    VariatorConfig(compression_ratio=3).save_pretrained(tmp_path)
    model = get_peft_model(BERT.build(), VariatorConfig.from_pretrained(tmp_path))
    assert model.compression_ratio == 3


def test_the_state_of_the_whole_model_still_loads(folder: Path) -> None:
    """As trainers keep it that save everything."""
    from peft import set_peft_model_state_dict

    model = PeftModel.from_pretrained(BERT.build(), str(folder)).eval()
    other = get_peft_model(BERT.build(), VariatorConfig())
    set_peft_model_state_dict(other, model.state_dict())
    expected = next(iter(outputs_of(model, BERT.inputs()).values()))
    assert torch.equal(next(iter(outputs_of(other.eval(), BERT.inputs()).values())), expected)
