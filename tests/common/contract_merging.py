"""Merging, for methods whose update is a weight of the base model; and refusing to, for the others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from .contract_base import ContractBase, ContractCase, assert_same_state, clone_state, differ, outputs_of, tuner_layers


TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class RefusesToMergeContract(ContractBase):
    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
    def test_merging_is_refused_and_changes_nothing(self, case: ContractCase, call: str) -> None:
        model = self.adapt(case)
        before, expected = clone_state(model), outputs_of(model, case)
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            getattr(model.base_model, call)()
        assert_same_state(clone_state(model), before)
        assert torch.equal(outputs_of(model, case), expected)
        assert not any(layer.merged for layer in tuner_layers(model).values())


class MergingContract(ContractBase):
    def test_merged_and_unmerged_agree(self, case: ContractCase) -> None:
        model = self.adapt(case)
        expected = outputs_of(model, case)
        model.merge_adapter()
        assert all(layer.merged_adapters == ["default"] for layer in tuner_layers(model).values())
        torch.testing.assert_close(outputs_of(model, case), expected, **TOLERANCE)
        model.unmerge_adapter()
        torch.testing.assert_close(outputs_of(model, case), expected, **TOLERANCE)

    @pytest.mark.parametrize("safe_merge", [False, True])
    def test_merge_and_unload_gives_a_plain_model(self, case: ContractCase, safe_merge: bool, tmp_path: Path) -> None:
        model = self.adapt(case)
        expected = outputs_of(model, case)
        merged = model.merge_and_unload(safe_merge=safe_merge)
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        assert not hasattr(merged, "peft_config")
        torch.testing.assert_close(outputs_of(merged, case), expected, **TOLERANCE)
        assert differ(outputs_of(merged, case), outputs_of(case.build(), case))
        merged.save_pretrained(tmp_path)
        loaded = type(case.build()).from_pretrained(tmp_path).eval()
        assert_same_state(clone_state(loaded), clone_state(merged))

    def test_several_adapters_are_merged_together_or_one_after_the_other(self, bare_case: ContractCase) -> None:
        case = bare_case
        model = self.adapt(case)
        self.add(model, case, "second")
        first = outputs_of(model, case)
        model.base_model.set_adapter(["default", "second"])
        both = outputs_of(model, case)
        assert differ(both, first)
        sequential = copy.deepcopy(model)
        for name in ("default", "second"):
            sequential.merge_adapter(adapter_names=[name])
        torch.testing.assert_close(outputs_of(sequential, case), both, **TOLERANCE)
        one = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
        torch.testing.assert_close(outputs_of(one, case), first, **TOLERANCE)
        together = model.merge_and_unload(adapter_names=["default", "second"])
        torch.testing.assert_close(outputs_of(together, case), both, **TOLERANCE)

    def test_merging_twice_does_nothing(self, case: ContractCase) -> None:
        model = self.adapt(case)
        model.merge_adapter()
        expected = outputs_of(model, case)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert torch.equal(outputs_of(model, case), expected)

    def test_a_broken_adapter_is_not_merged(self, case: ContractCase) -> None:
        model = self.adapt(case)
        with torch.no_grad():
            for parameter in self.adapter_parameters(model, "default").values():
                parameter[0] = torch.nan
        before = clone_state(model)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems"):
            model.merge_adapter(safe_merge=True)
        for name, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name

    def test_disabling_a_merged_adapter_gives_the_base_model(self, case: ContractCase) -> None:
        model = self.adapt(case)
        expected = outputs_of(model, case)
        model.merge_adapter()
        with model.disable_adapter():
            plain = outputs_of(case.build().requires_grad_(False), case)
            torch.testing.assert_close(outputs_of(model, case), plain, **TOLERANCE)
        torch.testing.assert_close(outputs_of(model, case), expected, **TOLERANCE)

    def test_a_merged_adapter_cannot_be_deleted(self, case: ContractCase) -> None:
        model = self.adapt(case)
        self.add(model, case, "second")
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
            model.delete_adapter("default")
        model.delete_adapter("second")
        model.unmerge_adapter()
        model.delete_adapter("default")
        assert not model.peft_config

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_merging_in_half_precision(self, case: ContractCase, dtype: torch.dtype) -> None:
        model = self.adapt(case).to(dtype)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.inputs.items()}
        expected = outputs_of(model, case, **inputs).float()
        merged = outputs_of(model.merge_and_unload(), case, **inputs).float()
        assert (merged - expected).norm() < 0.1 * expected.norm()
