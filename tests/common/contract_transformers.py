"""What transformers does with an adapted model: generation, embeddings, and its own functions for adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from .contract_base import ContractBase, ContractCase, assert_loaded_alike, differ, outputs_of, tuner_layers


class TransformersContract(ContractBase):
    def test_generate(self, generating_case: ContractCase) -> None:
        model = self.adapt(generating_case)
        ids = generating_case.inputs["input_ids"]
        generated = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert generated.shape[0] == ids.shape[0]
        if generating_case.task_type == "CAUSAL_LM":  # PEFT's other models take keywords only
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
        with pytest.raises(ValueError, match="adapter_names=.*one batch"):
            model.generate(input_ids=ids, max_new_tokens=2, adapter_names=["default"] * len(ids))

    def test_generate_in_half_precision_with_padding(self, generating_case: ContractCase) -> None:
        model = get_peft_model(generating_case.build().to(torch.bfloat16), self.config(generating_case)).eval()
        self.finish(model, "default")
        ids = generating_case.inputs["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3).shape[0] == ids.shape[0]

    def test_embeddings_instead_of_ids(self, text_case: ContractCase) -> None:
        model = self.adapt(text_case)
        rest = {name: value for name, value in text_case.inputs.items() if name != "input_ids"}
        embeddings = model.get_input_embeddings()(text_case.inputs["input_ids"])
        with torch.no_grad():
            output = model(inputs_embeds=embeddings, **rest)[0]
        torch.testing.assert_close(output, outputs_of(model, text_case), rtol=1e-5, atol=1e-5)

    def test_resized_embeddings_are_saved_with_the_adapter(self, text_case: ContractCase, tmp_path: Path) -> None:
        text_case.build().save_pretrained(tmp_path / "base")
        kind = type(text_case.build())

        def resized() -> torch.nn.Module:
            base = kind.from_pretrained(tmp_path / "base")
            base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
            return base.eval()

        model = get_peft_model(resized(), self.config(text_case)).eval()
        self.finish(model, "default")
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=0.3)
        with pytest.warns(UserWarning, match="embedding layer has been resized"):
            model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(resized(), tmp_path / "adapter")
        changes = {"input_ids": text_case.inputs["input_ids"].clone().fill_(model.config.vocab_size - 1)}
        assert torch.equal(outputs_of(loaded, text_case, **changes), outputs_of(model, text_case, **changes))

    def test_injection_without_a_wrapper(self, case: ContractCase) -> None:
        base = case.build()
        wrapped = self.adapt(case)
        torch.manual_seed(0)
        injected = inject_adapter_in_model(self.config(case), base)
        assert injected is base
        assert {f"base_model.model.{name}" for name in tuner_layers(base)} == set(tuner_layers(wrapped))
        inject_adapter_in_model(self.config(case), base, adapter_name="later", low_cpu_mem_usage=True)
        assert all(parameter.is_meta for parameter in self.adapter_parameters(base, "later").values())
        assert not any(parameter.is_meta for parameter in self.adapter_parameters(base, "default").values())

    def test_transformers_own_functions(self, case: ContractCase, tmp_path: Path) -> None:
        wrapped = self.adapt(case)
        wrapped.save_pretrained(tmp_path / "adapter")
        model = case.build().requires_grad_(False)
        plain = outputs_of(model, case)
        model.load_adapter(str(tmp_path / "adapter"), adapter_name="loaded")
        assert model.active_adapters() == ["loaded"]
        assert_loaded_alike(outputs_of(model, case), outputs_of(wrapped, case))
        model.disable_adapters()
        assert torch.equal(outputs_of(model, case), plain)
        model.enable_adapters()
        model.set_adapter("loaded")
        assert differ(outputs_of(model, case), plain)
        state = model.get_adapter_state_dict("loaded")
        assert len(state) == len(get_peft_model_state_dict(wrapped))
        model.save_pretrained(tmp_path / "again")
        again = case.build()
        again.load_adapter(str(tmp_path / "again"))
        assert_loaded_alike(outputs_of(again, case), outputs_of(wrapped, case))
        model.delete_adapter("loaded")
        assert torch.equal(outputs_of(model, case), plain)

    def test_hidden_states_are_those_of_the_blocks(self, case: ContractCase) -> None:
        model = self.adapt(case)
        expected = case.build()(**case.inputs, output_hidden_states=True)
        with torch.no_grad():
            output = model(**case.inputs, output_hidden_states=True)
        name = "hidden_states" if "hidden_states" in output else "encoder_hidden_states"
        assert [state.shape for state in output[name]] == [state.shape for state in expected[name]]
