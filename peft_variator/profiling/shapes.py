"""Dimensions of published models, to be measured with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


__all__ = ["SHAPES", "Shape", "Task"]

Task = Literal["encoder", "causal", "seq2seq", "vision"]


@dataclass(frozen=True)
class Shape:
    """Dimensions of a published model.

    Args:
        model_type: transformers' name of the architecture.
        task: how the model is used.
        fields: what differs from the defaults of the architecture's configuration, which are those of the first
            published model (BERT-base for `bert`, ViT-B/16 for `vit`).
    """

    model_type: str
    task: Task
    fields: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    "bert-base": Shape("bert", "encoder"),
    "minilm-l6": Shape(
        "bert",
        "encoder",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "t5-base-encoder": Shape(
        "t5", "encoder", {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    ),
    "vit-base": Shape("vit", "vision"),
    "qwen2.5-0.5b": Shape(
        "qwen2",
        "causal",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        "causal",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "llama-3.2-1b": Shape(
        "llama",
        "causal",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
}
