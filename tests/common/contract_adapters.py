"""Several adapters on one model: adding, choosing, disabling, deleting and removing them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .contract_base import ContractBase, ContractCase, assert_same_state, clone_state, differ, outputs_of, tuner_layers


def names_kept(layer: nn.Module) -> set[str]:
    """Keys of everything on a layer that is kept by name."""
    values: list[Any] = [*vars(layer).values(), *layer.children()]
    kept = [value for value in values if isinstance(value, dict | nn.ModuleDict | nn.ParameterDict | BufferDict)]
    return {key for value in kept if value is not layer._modules for key in value}


class AdaptersContract(ContractBase):
    def test_a_new_model_has_what_users_expect(self, case: ContractCase) -> None:
        model = self.adapt(case, adapter_name="mine")
        assert isinstance(model, PeftModel)
        assert model.base_model.prefix == self.prefix
        assert model.active_adapters == ["mine"]
        assert model.active_adapter == "mine"
        assert set(model.peft_config) == {"mine"}
        assert self.adapter_parameters(model, "mine")
        assert "mine" in repr(model)
        assert differ(outputs_of(model, case), outputs_of(case.build(), case))

    def test_layers_say_how_wide_they_are(self, case: ContractCase) -> None:
        for name, layer in tuner_layers(self.adapt(case)).items():
            assert layer.in_features > 0, name
            assert layer.out_features > 0, name
            assert type(layer).__name__ in repr(layer)

    def test_set_adapter_switches(self, case: ContractCase) -> None:
        model = self.adapt(case)
        first = outputs_of(model, case)
        self.add(model, case, "second")
        assert model.active_adapters == ["default"]
        assert torch.equal(outputs_of(model, case), first)
        model.set_adapter("second")
        assert model.active_adapters == ["second"]
        assert differ(outputs_of(model, case), first)
        model.set_adapter("default")
        assert torch.equal(outputs_of(model, case), first)

    def test_requires_grad_follows_the_active_adapter(self, case: ContractCase) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        for active in ("default", "second", "default"):
            model.set_adapter(active)
            trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert trains == set(self.adapter_parameters(model, active))

    def test_requires_grad_can_be_set_by_name(self, case: ContractCase) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        model.set_requires_grad(adapter_names=["default", "second"])
        for name in ("default", "second"):
            assert all(parameter.requires_grad for parameter in self.adapter_parameters(model, name).values())
        model.set_requires_grad(adapter_names="default", requires_grad=False)
        assert not any(parameter.requires_grad for parameter in self.adapter_parameters(model, "default").values())
        assert all(parameter.requires_grad for parameter in self.adapter_parameters(model, "second").values())

    def test_several_adapters_may_be_named_active(self, bare_case: ContractCase) -> None:
        model = self.adapt(bare_case)
        self.add(model, bare_case, "second")
        model.base_model.set_adapter(["default", "second"])
        assert model.active_adapters == ["default", "second"]

    def test_mixing_adapters_in_a_batch_is_refused(self, case: ContractCase) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        with pytest.raises(ValueError, match="adapter_names=.*one batch"):
            model(**case.inputs, adapter_names=["default", "second"])

    def test_a_name_is_given_once(self, case: ContractCase) -> None:
        model = self.adapt(case)
        before = clone_state(model)
        with pytest.raises(ValueError, match="'default'"):
            model.add_adapter("default", self.config(case))
        assert_same_state(clone_state(model), before)

    def test_disabled_is_the_base_model_bit_for_bit(self, case: ContractCase) -> None:
        base = case.build().requires_grad_(False)
        expected = outputs_of(base, case)
        model = self.adapt(case)
        adapted = outputs_of(model, case)
        with model.disable_adapter():
            assert all(layer.disable_adapters for layer in tuner_layers(model).values())
            assert torch.equal(outputs_of(model, case), expected)
        assert torch.equal(outputs_of(model, case), adapted)
        assert all(parameter.requires_grad for parameter in self.adapter_parameters(model, "default").values())

    def test_leaving_the_disabled_state_restores_the_one_before(self, case: ContractCase) -> None:
        model = self.adapt(case)
        model.base_model.disable_adapter_layers()
        with model.disable_adapter():
            pass
        assert all(layer.disable_adapters for layer in tuner_layers(model).values())
        model.base_model.enable_adapter_layers()
        assert not any(layer.disable_adapters for layer in tuner_layers(model).values())

    @pytest.mark.parametrize("deleted", ["default", "second"])
    def test_deleting_leaves_no_trace(self, case: ContractCase, deleted: str) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        (kept,) = {"default", "second"} - {deleted}
        model.set_adapter(kept)
        expected = outputs_of(model, case)
        model.set_adapter("default")
        model.delete_adapter(deleted)
        assert set(model.peft_config) == {kept}
        assert model.active_adapters == [kept]
        assert torch.equal(outputs_of(model, case), expected)
        assert not any(deleted in name.split(".") for name in model.state_dict())
        assert not any(deleted in names_kept(layer) for layer in tuner_layers(model).values())

    def test_the_last_adapter_can_be_deleted(self, case: ContractCase) -> None:
        model = self.adapt(case)
        model.delete_adapter("default")
        assert model.active_adapters == []
        expected = outputs_of(case.build().requires_grad_(False), case)
        assert torch.equal(outputs_of(model.base_model, case), expected)

    def test_deleting_an_unknown_adapter_is_refused(self, case: ContractCase) -> None:
        with pytest.raises(ValueError, match="Adapter nobody does not exist"):
            self.adapt(case).delete_adapter("nobody")

    def test_unload_gives_the_base_model_back(self, case: ContractCase) -> None:
        base = case.build()
        plain = case.build().requires_grad_(False)
        model = self.adapt(case).unload()
        assert type(model) is type(base)
        assert not tuner_layers(model)
        assert not hasattr(model, "peft_config")
        assert_same_state(clone_state(model), clone_state(base))
        for own, other in zip(model.modules(), base.modules(), strict=True):
            assert len(own._forward_hooks) == len(other._forward_hooks)
            assert len(own._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert torch.equal(outputs_of(model, case), outputs_of(plain, case))

    def test_status_tells_what_is_there(self, case: ContractCase) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        status = model.get_model_status()
        assert status.adapter_model_type == type(model.base_model).__name__
        assert status.peft_types == dict.fromkeys(("default", "second"), self.config_class().peft_type.value)
        layers = [
            module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
        assert status.num_adapter_layers == len(layers) == len(model.get_layer_status())
        assert status.available_adapters == ["default", "second"]
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.requires_grad == {"default": True, "second": False}
        assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
        trains = self.adapter_parameters(model, "default").values()
        assert status.trainable_params == sum(parameter.numel() for parameter in trains)
        model.set_adapter("second")
        with model.disable_adapter():
            assert model.get_model_status().enabled is False
        assert model.get_model_status().requires_grad == {"default": False, "second": True}

    def test_a_copy_is_independent(self, case: ContractCase) -> None:
        model = self.adapt(case)
        expected = outputs_of(model, case)
        other = copy.deepcopy(model)
        assert torch.equal(outputs_of(other, case), expected)
        with torch.no_grad():
            for parameter in self.adapter_parameters(other, "default").values():
                parameter.add_(1)
        assert differ(outputs_of(other, case), expected)
        assert torch.equal(outputs_of(model, case), expected)
        del model
        other.delete_adapter("default")
        assert torch.equal(outputs_of(other.base_model, case), outputs_of(case.build().requires_grad_(False), case))

    def test_input_casting_can_be_switched_off(self, case: ContractCase) -> None:
        model = self.adapt(case)
        expected = outputs_of(model, case)
        layers = tuner_layers(model).values()
        with disable_input_dtype_casting(model):
            assert not any(layer.cast_input_dtype_enabled for layer in layers)
            assert torch.equal(outputs_of(model, case), expected)
        assert all(layer.cast_input_dtype_enabled for layer in layers)

    def test_excluded_modules_stay_as_they_are(self, case: ContractCase) -> None:
        whole = tuner_layers(self.adapt(case).base_model.model)
        excluded = list(whole)[0]
        model = self.adapt(case, exclude_modules=[excluded])
        assert excluded not in tuner_layers(model.base_model.model)
        assert 0 < len(tuner_layers(model)) < len(whole)
        with pytest.raises(ValueError, match="exclude"):
            self.adapt(case, exclude_modules=r".*")
