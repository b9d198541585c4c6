"""SparseLoRA: LoRA under the mask of a pruned model (He et al. 2024, https://arxiv.org/abs/2404.02424)."""

from ...registration import register_tuner
from .base_weight import WeightLayout, register_layout
from .config import SparseLoraConfig
from .layer import SparseLoraConv2d, SparseLoraLayer, SparseLoraLinear
from .model import SparseLoraModel, attach_masks


__all__ = [
    "SparseLoraConfig",
    "SparseLoraConv2d",
    "SparseLoraLayer",
    "SparseLoraLinear",
    "SparseLoraModel",
    "WeightLayout",
    "attach_masks",
    "register_layout",
]

register_tuner("sparse_low_rank", SparseLoraConfig, SparseLoraModel)
