"""Adapters for PEFT that make the models you already have cheaper to run.

Importing this package registers its methods with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` know them.
"""

from .bases import Sparse24Config, Sparse24Linear, load_base
from .tuners.sparse_lora import SparseLoraConfig, SparseLoraModel, attach_masks
from .tuners.variator import VariatorConfig, VariatorModel, set_compression_ratio


__all__ = [
    "Sparse24Config",
    "Sparse24Linear",
    "SparseLoraConfig",
    "SparseLoraModel",
    "VariatorConfig",
    "VariatorModel",
    "attach_masks",
    "load_base",
    "set_compression_ratio",
]

__version__ = "0.1.0"
