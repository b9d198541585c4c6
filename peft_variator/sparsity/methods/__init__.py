"""The pruning methods: one file each, with its mathematics and the dataclass of its options."""

from . import dsnot, magnitude, sparsegpt, wanda  # each registers what it holds
from .base import (
    METHODS,
    MethodOption,
    PruningMethod,
    ScoredMethod,
    make_method,
    method_options,
    option,
    register_method,
)


__all__ = [
    "METHODS",
    "MethodOption",
    "PruningMethod",
    "ScoredMethod",
    "dsnot",
    "magnitude",
    "make_method",
    "method_options",
    "option",
    "register_method",
    "sparsegpt",
    "wanda",
]
