"""The Variator tuner keeps the contract of PEFT's methods."""

from __future__ import annotations

from typing import Any

from peft_variator import VariatorConfig
from tests.common.peft_contract import ContractCase, PeftContract, RefusesToMergeContract, one_process_group
from tests.tiny_models import BY_NAME, Case


__all__ = ["TestVariatorContract", "one_process_group"]


def contract_case(
    name: str, task_type: str | None = None, head: str | None = None, slow: bool = False, **fields: Any
) -> ContractCase:
    case: Case = BY_NAME[name]
    label = "-".join([name, *map(str, fields.values())])
    return ContractCase(label, case.build, case.inputs(), task_type, fields, head, slow=slow)


class TestVariatorContract(PeftContract, RefusesToMergeContract):
    config_class = VariatorConfig
    random_start = {"init_weights": False, "bottleneck_dim": 8}
    prefix = "variator_"
    cases = [
        contract_case("bert", "FEATURE_EXTRACTION", slow=True),
        contract_case("bert-sequence", "SEQ_CLS", head="classifier", keep_first_tokens=0),
        contract_case("t5", "SEQ_2_SEQ_LM"),
        contract_case("llama", "CAUSAL_LM", head="lm_head"),
        contract_case("opt", "CAUSAL_LM", scoring="concat"),
        contract_case("vit", slow=True),
    ]
