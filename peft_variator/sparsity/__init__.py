"""Pruning: magnitude, Wanda, SparseGPT and DSnoT, unstructured or n:m, and how sparse a model is."""

from .config import PruningConfig
from .inspection import inspect_checkpoint
from .patterns import Pattern
from .pruner import measure_sparsity, prune
from .report import ModuleSparsity, SparsityReport


__all__ = [
    "ModuleSparsity",
    "Pattern",
    "PruningConfig",
    "SparsityReport",
    "inspect_checkpoint",
    "measure_sparsity",
    "prune",
]
