"""Half precision: which dtype an adapter gets, and that a half-precision base model runs with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from .contract_base import ContractBase, ContractCase, loss_of, outputs_of


HALVES = [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]


class PrecisionContract(ContractBase):
    def dtypes(self, model: PeftModel, adapter_name: str) -> set[torch.dtype]:
        own = self.adapter_parameters(model, adapter_name).items()
        return {parameter.dtype for name, parameter in own if f".{self.prefix}" in name}  # a head keeps its own

    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
    def test_dtype_of_the_adapter(
        self, case: ContractCase, dtype: torch.dtype, autocast_adapter_dtype: bool, tmp_path: Path
    ) -> None:
        expected = {torch.float32} if autocast_adapter_dtype else {dtype}
        base, config = case.build().to(dtype), self.config(case)
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
        model.add_adapter("other", self.config(case), autocast_adapter_dtype=autocast_adapter_dtype)
        for name in ("default", "other"):
            self.finish(model, name)
            assert self.dtypes(model, name) == expected
        assert {parameter.dtype for parameter in case.build().to(dtype).parameters()} == {dtype}
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
            loaded = PeftModel.from_pretrained(case.build().to(dtype), tmp_path, **options)
            loaded.load_adapter(tmp_path / "other", adapter_name="other", **options)
            assert self.dtypes(loaded, "default") == self.dtypes(loaded, "other") == expected

    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_a_half_precision_base_runs_and_trains(
        self, case: ContractCase, dtype: torch.dtype, autocast_adapter_dtype: bool
    ) -> None:
        reference = self.adapt(case)
        torch.manual_seed(0)
        base = case.build().to(dtype)
        model = get_peft_model(base, self.config(case), autocast_adapter_dtype=autocast_adapter_dtype).eval()
        self.finish(model, "default")
        set_peft_model_state_dict(model, get_peft_model_state_dict(reference))
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.inputs.items()}
        output = outputs_of(model, case, **inputs)
        assert output.dtype == dtype
        exact = outputs_of(reference, case)
        assert (output.float() - exact).norm() < 0.3 * exact.norm()
        model(**inputs)[0].float().square().mean().backward()
        for name, parameter in self.adapter_parameters(model, "default").items():
            assert torch.isfinite(parameter.grad).all(), name

    def test_autocast(self, autocast_case: ContractCase) -> None:
        case = autocast_case
        model = self.adapt(case)
        exact = outputs_of(model, case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = outputs_of(model, case)
            loss_of(model, case).backward()
        assert (output.float() - exact).norm() < 0.3 * exact.norm()
        assert all(parameter.grad is not None for parameter in self.adapter_parameters(model, "default").values())
