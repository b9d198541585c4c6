"""What is left of a save over an earlier adapter that was cut off between its files can't be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, modeling_utils

from peft_variator import DistillationConfig, DistillationTrainer, SparseLoraConfig, VariatorConfig
from tests.tiny_models import tiny_model


class Killed(BaseException):
    pass


def cut_off(save: Callable[..., None], before: bool) -> Callable[..., None]:
    """What a kill before or after the tensors are written looks like to the files."""

    def save_file(*args: Any, **kwargs: Any) -> None:
        if not before:
            save(*args, **kwargs)
        raise Killed

    return save_file


def configs(method: str) -> list[PeftConfig]:
    """Two whose adapters have tensors of the same names and shapes, which compute different things."""
    if method == "variator":
        return [VariatorConfig(compression_ratio=k, init_weights=False, bottleneck_dim=2) for k in (2, 4)]
    names = ["q_proj"]
    return [SparseLoraConfig(r=2, lora_alpha=a, target_modules=names, init_lora_weights=False) for a in (2, 16)]


@pytest.mark.parametrize("method", ["variator", "sparse_lora"])
@pytest.mark.parametrize("name", ["default", "other"])
def test_peft_leaves_no_mix(method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    base = tiny_model("llama", num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    place = tmp_path / "adapter" if name == "default" else tmp_path / "adapter" / name

    def load() -> PeftModel:
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), place)

    old, new = (
        get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config, adapter_name=name).eval()
        for config in configs(method)
    )
    old.save_pretrained(tmp_path / "adapter")
    load()
    with monkeypatch.context() as patch:
        patch.setattr(peft.peft_model, "safe_save_file", cut_off(peft.peft_model.safe_save_file, before=False))
        with pytest.raises(Killed):
            new.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load()
    new.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 19).unsqueeze(0)
    torch.testing.assert_close(load().eval()(ids).logits, new(ids).logits)
    assert not [path for path in (tmp_path / "adapter").rglob("*") if "partial" in path.name]


def test_transformers_leaves_no_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio, is_cut in ((2, False), (4, True)):
        model = tiny_model("llama", num_hidden_layers=1)
        model.add_adapter(VariatorConfig(compression_ratio=ratio, init_weights=False, bottleneck_dim=2))
        if not is_cut:
            model.save_pretrained(tmp_path)
            continue
        monkeypatch.setattr(modeling_utils, "safe_save_file", cut_off(modeling_utils.safe_save_file, before=True))
        with pytest.raises(Killed):
            model.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), tmp_path)


def test_a_config_saved_alone_takes_no_tensors_away(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama", num_hidden_layers=1), VariatorConfig(bottleneck_dim=2))
    model.save_pretrained(tmp_path)
    model.peft_config["default"].save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), tmp_path)


def test_no_run_goes_on_from_a_mix_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint over one of an earlier run: the new adapter beside the old optimizer."""

    def run() -> DistillationTrainer:
        plugin = get_peft_model(tiny_model("bert", num_hidden_layers=1), VariatorConfig(bottleneck_dim=2))
        args = DistillationConfig(str(tmp_path), max_steps=1, save_steps=1, report_to="none", disable_tqdm=True)
        return DistillationTrainer(plugin, args, train_dataset=[{"input_ids": torch.arange(3, 19)}] * 8)

    def save(thing: Any, path: str) -> None:
        if Path(path).name == "optimizer.pt":
            raise Killed

    run().train()
    run().train(resume_from_checkpoint=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(Killed):
            run().train()
    with pytest.raises((OSError, ValueError), match=r"trainer_state\.json"):
        run().train(resume_from_checkpoint=True)
