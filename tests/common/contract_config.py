"""The configuration: what PEFT does with every method's."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from .contract_base import ContractBase, ContractCase


def as_json(value: Any) -> Any:
    """A set as what it is in a file, where order tells nothing."""
    return sorted(value) if isinstance(value, set | list) else value


class ConfigContract(ContractBase):
    def test_config_is_registered_under_its_type(self) -> None:
        config = self.config_class()
        assert isinstance(config.peft_type, PeftType)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type] is self.config_class
        assert type(PeftConfig.from_peft_type(peft_type=config.peft_type)) is self.config_class

    def test_every_field_has_a_default_and_a_help(self) -> None:
        own = {item.name for item in dataclasses.fields(self.config_class)}
        own -= {item.name for item in dataclasses.fields(PeftConfig)}
        assert own
        for item in dataclasses.fields(self.config_class):
            assert item.name not in own or len(item.metadata["help"]) > 10, item.name

    def test_config_survives_its_file(self, case: ContractCase, tmp_path: Path) -> None:
        config = self.config(case)
        config.save_pretrained(str(tmp_path))
        for loaded in (self.config_class.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
            assert type(loaded) is self.config_class
            assert loaded.to_dict() == config.to_dict()
        file = tmp_path / "adapter_config.json"
        written = self.config_class.from_json_file(str(file))
        assert {name: as_json(value) for name, value in written.items()} == {
            name: as_json(value) for name, value in config.to_dict().items()
        }
        assert json.loads(file.read_text())["peft_type"] == config.peft_type.value

    def test_config_can_be_copied(self, case: ContractCase) -> None:
        config = self.config(case)
        for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert type(other) is self.config_class
            assert other.to_dict() == config.to_dict()

    def test_unknown_keys_of_a_newer_file_are_ignored_with_a_warning(self, tmp_path: Path) -> None:
        config = self.config_class()
        config.save_pretrained(str(tmp_path))
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"from_the_future": 1}))
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\]"):
            loaded = PeftConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() == config.to_dict()

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"color": "blue"}')
        with pytest.raises(TypeError, match="missing required keys: {'peft_type'}"):
            self.config_class.from_pretrained(tmp_path)

    @pytest.mark.parametrize("task_type", [None, *TaskType])
    def test_every_task_is_accepted(self, task_type: TaskType | None) -> None:
        assert self.config_class(task_type=task_type).task_type == task_type

    def test_an_unknown_task_is_refused(self) -> None:
        with pytest.raises(ValueError, match="Invalid task type: 'juggling'"):
            self.config_class(task_type="juggling")

    def test_layers_pattern_needs_layers(self) -> None:
        with pytest.raises(ValueError, match="layers_pattern.*layers_to_transform"):
            self.config_class(target_modules=["dense"], layers_pattern="layer")
        assert self.config_class(target_modules=["dense"], layers_pattern="layer", layers_to_transform=0)
