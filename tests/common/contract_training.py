"""Training: which parameters move, with and without gradient checkpointing, in some layers, beside a head, sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from peft.utils import ModulesToSaveWrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from .contract_base import ContractBase, ContractCase, clone_state, loss_of, outputs_of, tuner_layers


@pytest.fixture(scope="class")
def one_process_group() -> Iterator[None]:
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TrainingContract(ContractBase):
    def gradients(self, model: PeftModel, case: ContractCase) -> dict[str, torch.Tensor]:
        """Gradients of the adapter, with the same dropout in every call."""
        model.zero_grad()
        torch.manual_seed(0)
        loss_of(model.train(), case).backward()
        return {
            name: parameter.grad.clone()
            for name, parameter in self.adapter_parameters(model, "default").items()
            if parameter.grad is not None
        }

    def test_a_new_adapter_is_all_that_trains(self, case: ContractCase) -> None:
        model = self.adapt(case)
        own = self.adapter_parameters(model, "default")
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(own)
        trainable, total = model.get_nb_trainable_parameters()
        assert trainable == sum(parameter.numel() for parameter in own.values())
        assert total == trainable + sum(parameter.numel() for parameter in case.build().parameters())

    def test_a_step_moves_every_adapter_parameter_and_no_other(self, case: ContractCase) -> None:
        model = self.adapt(case).train()
        own, before = set(self.adapter_parameters(model, "default")), clone_state(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss_of(model, case).backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == own
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == own

    def test_an_adapter_trains_without_touching_another(self, case: ContractCase) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        expected = outputs_of(model, case)
        model.set_adapter("second")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss_of(model, case).backward()
        optimizer.step()
        model.set_adapter("default")
        assert torch.equal(outputs_of(model, case), expected)

    def test_what_was_trained_is_loaded(self, case: ContractCase, tmp_path: Path) -> None:
        model = self.adapt(case)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, case).backward()
            optimizer.step()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path)
        assert torch.equal(outputs_of(loaded, case), outputs_of(model, case))

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_gives_the_same_gradients(self, case: ContractCase, use_reentrant: bool) -> None:
        model = self.adapt(case)
        expected = self.gradients(model, case)
        assert expected
        model.enable_input_require_grads()
        base = model.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        actual = self.gradients(model, case)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )

    def test_some_layers_only(self, case: ContractCase, tmp_path: Path) -> None:
        whole = self.adapt(case)
        model = self.adapt(case, layers_to_transform=[0])
        assert 0 < len(tuner_layers(model)) < len(tuner_layers(whole))
        assert all(".0." in name for name in tuner_layers(model))
        loss_of(model, case).backward()
        own = self.adapter_parameters(model, "default")
        assert all(parameter.grad is not None for parameter in own.values())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.build(), tmp_path)
        assert tuner_layers(loaded).keys() == tuner_layers(model).keys()
        assert torch.equal(outputs_of(loaded, case), outputs_of(model, case))

    def test_embeddings_stay_frozen_unless_inputs_are_asked_for(self, text_case: ContractCase) -> None:
        model = self.adapt(text_case)
        ids = text_case.inputs["input_ids"]
        assert not model.get_input_embeddings()(ids).requires_grad
        model = get_peft_model(prepare_model_for_kbit_training(text_case.build()), self.config(text_case))
        model.enable_input_require_grads()
        assert model.get_input_embeddings()(ids).requires_grad
        assert not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())

    def test_a_head_is_trained_and_saved_beside_the_adapter(self, head_case: ContractCase, tmp_path: Path) -> None:
        fields: dict[str, Any] = {"modules_to_save": [head_case.head]}
        model = self.adapt(head_case, **fields)
        wrapper = model.get_base_model().get_submodule(head_case.head)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model, head_case).backward()
        optimizer.step()
        for name, value in wrapper.original_module.named_parameters():
            assert not torch.equal(value, dict(wrapper.modules_to_save["default"].named_parameters())[name])
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(head_case.build(), tmp_path)
        assert torch.equal(outputs_of(loaded, head_case), outputs_of(model, head_case))
        with model.disable_adapter():
            expected = outputs_of(head_case.build().requires_grad_(False), head_case)
            assert torch.equal(outputs_of(model, head_case), expected)
        self.add(model, head_case, "without_a_head", modules_to_save=None)
        model.set_adapter("without_a_head")
        assert not wrapper.modules_to_save["default"].weight.requires_grad
        model.delete_adapter("default")
        assert "default" not in wrapper.modules_to_save

    def test_sharded_parameters(self, case: ContractCase, one_process_group: None) -> None:
        model = self.adapt(case)
        expected, state = outputs_of(model, case), get_peft_model_state_dict(model)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.testing.assert_close(outputs_of(sharded, case), expected)
        assert get_peft_model_state_dict(sharded).keys() == state.keys()
        loss_of(sharded, case).backward()
