"""How many tokens a model has positions for."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig


__all__ = ["count_positions"]


def count_positions(config: PreTrainedConfig) -> int | None:
    """Most tokens in a sequence, special tokens included; None for a model whose positions are relative.

    RoBERTa and its kin number their positions from the one after the padding's, so they have fewer than their
    configuration says: 512 of 514.

    Args:
        config: the model's configuration; of a model with several towers that of its text counts.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    with torch.device("meta"):
        modules = AutoModel.from_config(text).named_modules()
    reserved = [
        module.padding_idx + 1
        for name, module in modules
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return positions - max(reserved, default=0)
