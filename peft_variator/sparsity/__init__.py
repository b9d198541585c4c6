"""Pruning: magnitude, Wanda, SparseGPT and DSnoT, unstructured or n:m, and how sparse a model is."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import PruningConfig
    from .inspection import inspect_checkpoint
    from .patterns import Pattern
    from .pruner import measure_sparsity, prune
    from .sparsity_report import ModuleSparsity, SparsityReport


__all__ = [
    "ModuleSparsity",
    "Pattern",
    "PruningConfig",
    "SparsityReport",
    "inspect_checkpoint",
    "measure_sparsity",
    "prune",
]

# Where each name is, imported on first use: the command line's help lists `methods` and has no time for torch.
_FILES = {
    "config": ("PruningConfig",),
    "inspection": ("inspect_checkpoint",),
    "patterns": ("Pattern",),
    "pruner": ("measure_sparsity", "prune"),
    "sparsity_report": ("ModuleSparsity", "SparsityReport"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FILE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
