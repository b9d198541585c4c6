"""Variator: plug-and-play compression plugins (Xiao et al. 2023, https://arxiv.org/abs/2310.15724)."""

from ...registration import register_tuner
from .config import VariatorConfig
from .correction_fit import fit_correction
from .folding import fold_updates
from .layer import VariatorLayer
from .model import VariatorModel
from .neuron_selection import calibrate
from .quantization import quantize_plugin, shrink_plugin
from .ratios import exported_ratio, set_compression_ratio, set_min_tokens, using_ratio


__all__ = [
    "VariatorConfig",
    "VariatorLayer",
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
]

register_tuner("variator", VariatorConfig, VariatorModel)
