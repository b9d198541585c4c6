"""Saving and loading: which files and tensors there are, and that what comes back is what was saved."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import (
    AutoPeftModel,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from .contract_base import ContractBase, ContractCase, assert_loaded_alike, assert_same_state, clone_state, outputs_of


FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


class SavingContract(ContractBase):
    def test_round_trip_gives_the_same_bits(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        model.save_pretrained(tmp_path)
        assert files_in(tmp_path) == FILES
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
            loaded = PeftModel.from_pretrained(case.build(), tmp_path)
        assert type(loaded) is type(model)
        assert_same_state(clone_state(model), clone_state(loaded))
        assert torch.equal(outputs_of(loaded, case), outputs_of(model, case))

    def test_the_file_holds_the_adapter_and_nothing_else(self, bare_case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(bare_case, adapter_name="first")
        model.save_pretrained(tmp_path)
        keys = set(load_file(tmp_path / "first" / "adapter_model.safetensors"))
        assert keys == set(get_peft_model_state_dict(model, adapter_name="first"))
        assert all(f".{self.prefix}" in key and "first" not in key for key in keys)

    def test_an_adapter_can_be_loaded_under_another_name(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, adapter_name="other")
        assert list(loaded.peft_config) == ["other"]
        assert torch.equal(outputs_of(loaded, case), outputs_of(model, case))

    def test_selected_adapters_are_saved(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        expected = outputs_of(model, case)
        model.set_adapter("second")
        model.save_pretrained(tmp_path / "all")
        assert files_in(tmp_path / "all") == files_in(tmp_path / "all" / "second") | {"README.md"} == FILES
        model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
        assert not (tmp_path / "one" / "second").exists()
        loaded = PeftModel.from_pretrained(case.build(), tmp_path / "one")
        assert torch.equal(outputs_of(loaded, case), expected)
        with pytest.raises(ValueError, match="nobody"):
            model.save_pretrained(tmp_path, selected_adapters=["nobody"])

    def test_names_that_contain_each_other_are_told_apart(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        count = len(get_peft_model_state_dict(model))
        for name in ("default2", "my_default", "efaul", "a_default_b"):
            self.add(model, case, name)
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == count

    def test_several_adapters_are_loaded_beside_each_other(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path)
        result = loaded.load_adapter(tmp_path / "second", adapter_name="second")
        assert not result.missing_keys
        assert not result.unexpected_keys
        for name in ("second", "default"):
            loaded.set_adapter(name)
            model.set_adapter(name)
            assert torch.equal(outputs_of(loaded, case), outputs_of(model, case))

    def test_a_given_config_is_used_as_it_is(self, case: ContractCase, tmp_path: Path) -> None:
        self.adapt(case).save_pretrained(tmp_path)
        config = self.config(case)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, config=config, is_trainable=False)
        assert loaded.peft_config["default"] is config
        assert config.inference_mode

    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_a_loaded_adapter_trains_if_asked_to(self, case: ContractCase, is_trainable: bool, tmp_path: Path) -> None:
        self.adapt(case).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, is_trainable=is_trainable)
        trains = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert trains == (set(self.adapter_parameters(loaded, "default")) if is_trainable else set())

    def test_low_memory_loading_leaves_nothing_unloaded(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, low_cpu_mem_usage=True)
        loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
        assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
        state = get_peft_model_state_dict(model)
        for name in ("default", "other"):
            loaded.set_adapter(name)
            assert_same_state(get_peft_model_state_dict(loaded, adapter_name=name), state)
            assert_loaded_alike(outputs_of(loaded, case), outputs_of(model, case))

    def test_a_device_map_may_be_given(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, device_map={"": "cpu"}, torch_device="cpu")
        assert torch.equal(outputs_of(loaded, case), outputs_of(model, case))

    def test_keys_can_be_mapped(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({key.replace(".model.", ".old_name."): value for key, value in load_file(file).items()}, file)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path, key_mapping={r"^old_name\b": "model"})
        assert_same_state(clone_state(loaded), clone_state(model))

    def test_state_dicts_can_be_taken_and_set(self, case: ContractCase) -> None:
        model = self.adapt(case)
        state = get_peft_model_state_dict(model)
        other = get_peft_model(case.build(), self.config(case)).eval()
        result = set_peft_model_state_dict(other, state)
        assert not result.unexpected_keys
        assert torch.equal(outputs_of(other, case), outputs_of(model, case))
        assert_same_state(get_base_model_state_dict(model), clone_state(case.build()))

    def test_the_auto_class_finds_base_and_adapter(self, case: ContractCase, tmp_path: Path) -> None:
        base = case.build()
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
        model = get_peft_model(base, self.config(case)).eval()
        self.finish(model, "default")
        model.save_pretrained(tmp_path / "adapter")
        suffix = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", "SEQ_2_SEQ_LM": "ForSeq2SeqLM"}
        suffix |= {"FEATURE_EXTRACTION": "ForFeatureExtraction"}
        auto = getattr(peft, f"AutoPeftModel{suffix[case.task_type]}") if case.task_type else AutoPeftModel
        loaded = auto.from_pretrained(tmp_path / "adapter", is_trainable=True)
        assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
        assert torch.equal(outputs_of(loaded.eval(), case), outputs_of(model, case))
        assert all(parameter.requires_grad for parameter in self.adapter_parameters(loaded, "default").values())
