"""SparseLoRA keeps the contract of PEFT's methods."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import DebertaConfig, DebertaModel, PreTrainedModel

from peft_variator import SparseLoraConfig
from peft_variator.tuners.sparse_lora import SparseLoraLayer, attach_masks
from tests.common.peft_contract import ContractCase, MergingContract, PeftContract, one_process_group
from tests.tiny_models import built_once

from .cases import CASES, build, prune_, random_masks


__all__ = ["TestSparseLoraContract", "one_process_group"]


@built_once
def deberta() -> PreTrainedModel:
    """A model that changes the result of a linear layer in place."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = DebertaModel(DebertaConfig(vocab_size=40, relative_attention=True, pos_att_type=["c2p", "p2c"], **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return prune_(model.eval())


def contract_case(
    name: str,
    task_type: str | None = None,
    head: str | None = None,
    pruned: bool = True,
    slow: bool = False,
    **fields: Any,
) -> ContractCase:
    fields = CASES[name].targets | fields
    label = "-".join([name, *(str(value) for key, value in fields.items() if key != "target_modules")])
    return ContractCase(label, lambda: build(name, pruned), CASES[name].inputs, task_type, fields, head, slow=slow)


class TestSparseLoraContract(PeftContract, MergingContract):
    config_class = SparseLoraConfig
    random_start = {"init_lora_weights": False, "r": 4, "lora_alpha": 16}
    prefix = "sparse_low_rank_"
    cases = [
        contract_case("bert", "SEQ_CLS", head="classifier"),
        contract_case("gpt2", "CAUSAL_LM", recompute=False),
        contract_case("llama", "CAUSAL_LM", head="lm_head"),
        contract_case("vit", head="classifier", slow=True),
        contract_case("llama", "CAUSAL_LM", pruned=False, mask="stored"),
        ContractCase("deberta", deberta, CASES["bert"].inputs, "FEATURE_EXTRACTION", autocasts=False),
    ]

    def finish(self, model: PeftModel, adapter_name: str) -> None:
        base = model.get_base_model()
        if model.peft_config[adapter_name].mask == "stored":
            layers = [name for name, layer in base.named_modules() if isinstance(layer, SparseLoraLayer)]
            attach_masks(model, random_masks(base, layers), adapter_name)
