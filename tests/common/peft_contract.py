"""Everything that PEFT and transformers take for granted about a method, as one class to inherit from.

A test class names its method and its cases:

    class TestContract(PeftContract, MergingContract):
        config_class = MyConfig
        ...
"""

from __future__ import annotations

from .contract_adapters import AdaptersContract
from .contract_base import ContractCase
from .contract_config import ConfigContract
from .contract_merging import MergingContract, RefusesToMergeContract
from .contract_precision import PrecisionContract
from .contract_saving import SavingContract
from .contract_training import TrainingContract, one_process_group
from .contract_transformers import TransformersContract


__all__ = ["ContractCase", "MergingContract", "PeftContract", "RefusesToMergeContract", "one_process_group"]


class PeftContract(
    ConfigContract,
    AdaptersContract,
    SavingContract,
    TrainingContract,
    PrecisionContract,
    TransformersContract,
):
    """What every method passes, whether it can be merged or not."""
