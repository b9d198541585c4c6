"""Pruning: magnitude, Wanda, SparseGPT and DSnoT, unstructured or n:m, and how sparse a model is."""

from peft_variator.sparsity.config import PruningConfig
from peft_variator.sparsity.patterns import Pattern
from peft_variator.sparsity.pruner import measure_sparsity, prune
from peft_variator.sparsity.report import ModuleSparsity, SparsityReport


__all__ = ["ModuleSparsity", "Pattern", "PruningConfig", "SparsityReport", "measure_sparsity", "prune"]
