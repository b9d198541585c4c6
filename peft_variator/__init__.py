"""Adapters for PEFT that make the models you already have cheaper to run.

Importing this package registers its methods with PEFT, so that `get_peft_model`, `PeftModel.from_pretrained` and
transformers' `load_adapter` know them, and makes transformers know packed 2:4 models.
"""

import re
import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__


if TYPE_CHECKING:
    from .bases import Sparse24Config, Sparse24Linear, load_base
    from .profiling import allocate
    from .sparsity import PruningConfig, SparsityReport, prune
    from .training import DistillationConfig, DistillationTrainer, load_plugin
    from .tuners.sparse_lora import SparseLoraConfig, SparseLoraModel, attach_masks
    from .tuners.variator import (
        VariatorConfig,
        VariatorModel,
        calibrate,
        exported_ratio,
        fit_correction,
        fold_updates,
        quantize_plugin,
        set_compression_ratio,
        set_min_tokens,
        shrink_plugin,
        using_ratio,
    )


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
    "allocate",
    "attach_masks",
    "calibrate",
    "exported_ratio",
    "fit_correction",
    "fold_updates",
    "load_base",
    "load_plugin",
    "prune",
    "quantize_plugin",
    "set_compression_ratio",
    "set_min_tokens",
    "shrink_plugin",
    "using_ratio",
]

# Where each name is, imported on first use: a program that only runs a model needs neither trainer nor pruners.
_ROOMS = {
    "bases": ("Sparse24Config", "Sparse24Linear", "load_base"),
    "profiling": ("allocate",),
    "sparsity": ("PruningConfig", "SparsityReport", "prune"),
    "training": ("DistillationConfig", "DistillationTrainer", "load_plugin"),
    "tuners.sparse_lora": ("SparseLoraConfig", "SparseLoraModel", "attach_masks"),
    "tuners.variator": (
        "VariatorConfig",
        "VariatorModel",
        "calibrate",
        "exported_ratio",
        "fit_correction",
        "fold_updates",
        "quantize_plugin",
        "set_compression_ratio",
        "set_min_tokens",
        "shrink_plugin",
        "using_ratio",
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
# Importing these registers what they hold.
_REGISTERING = ("tuners.variator", "tuners.sparse_lora", "bases")
# `-m`, maybe behind options of Python without a value and before the module's name, as in `-Im` and `-mpackage`.
_MODULE_OPTION = re.compile(r"-[bBdEhiIOPqRsSuvx]*m(.*)")


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_own_command() -> bool:
    """Whether this process is the `peft-variator` command, which shows its help before anything heavy is imported."""
    if sys.argv[:1] != ["-m"]:  # which stands there while Python still looks for the module to run
        return bool(sys.argv) and PurePath(sys.argv[0]).name in ("peft-variator", "peft-variator.exe")
    for word, following in zip(sys.orig_argv[1:], [*sys.orig_argv[2:], ""], strict=True):
        found = _MODULE_OPTION.match(word)
        if found is not None:
            return (found[1] or following) == __name__
    return False


def _register() -> None:
    """Make the methods known to PEFT, and packed models to transformers; once is as good as often."""
    for room in _REGISTERING:
        import_module(f".{room}", __name__)


if not _is_own_command():
    _register()
