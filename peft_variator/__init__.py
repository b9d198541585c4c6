"""Adapters for PEFT that make the models you already have cheaper to run.

Importing this package registers its methods with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` know them, and makes transformers know packed 2:4 models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .bases import Sparse24Config, Sparse24Linear, load_base
from .tuners.sparse_lora import SparseLoraConfig, SparseLoraModel, attach_masks
from .tuners.variator import VariatorConfig, VariatorModel, set_compression_ratio


if TYPE_CHECKING:
    from .sparsity import PruningConfig, SparsityReport, prune
    from .training import DistillationConfig, DistillationTrainer, load_plugin


__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "PruningConfig",
    "Sparse24Config",
    "Sparse24Linear",
    "SparseLoraConfig",
    "SparseLoraModel",
    "SparsityReport",
    "VariatorConfig",
    "VariatorModel",
    "attach_masks",
    "load_base",
    "load_plugin",
    "prune",
    "set_compression_ratio",
]

__version__ = "0.1.0"

# Imported on first use: a program that only runs a model needs neither the trainer nor the pruners.
_ON_FIRST_USE = {
    "DistillationConfig": "training",
    "DistillationTrainer": "training",
    "PruningConfig": "sparsity",
    "SparsityReport": "sparsity",
    "load_plugin": "training",
    "prune": "sparsity",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ON_FIRST_USE[name]}", __name__), name)
