"""Tiny models with random weights and random examples for them, for tests in this process and in others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from peft_variator import VariatorConfig
from tests.tiny_models import built_once, tiny_model


VOCABULARY = 60

# Weights so large that a plugin's error is not tiny, and the dropout that models have by default.
WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.4}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64} | WIDTHS
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_head": 2, "n_inner": 64, "initializer_range": 0.4}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 32, "num_heads": 2, "dropout_rate": 0.1}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: tiny_model("bert", **TEXT, **DROPOUT),
    "bert-classifier": lambda: tiny_model("bert-sequence", **TEXT, **DROPOUT, num_labels=3),
    "gpt2": lambda: tiny_model("gpt2", **GPT2),
    "llama": lambda: tiny_model("llama", **TEXT),
    "t5": lambda: tiny_model("t5", **T5),
    "vit": lambda: tiny_model("vit-classes", **WIDTHS, image_size=16, num_labels=3),
}


@built_once
def build_base(name: str) -> PreTrainedModel:
    """The base model of a name, always the same one."""
    set_seed(0)
    return MODELS[name]()


def build_plugin(name: str, **fields: Any) -> PeftModel:
    """A base model with a Variator plugin, always the same one."""
    return get_peft_model(build_base(name), VariatorConfig(**{"bottleneck_dim": 4, **fields}))


def make_examples(name: str, count: int = 16, seed: int = 0, labels: bool = True) -> list[dict[str, Any]]:
    """Random examples for a model: 6 to 29 tokens with the labels that its head takes, or images."""
    if name == "vit":
        return _images(count, seed, labels)
    texts = _texts(count, seed)
    if not labels or name == "bert":
        return texts
    for index, text in enumerate(texts):
        ids = text["input_ids"]
        prompt = len(ids) // 2
        if name == "bert-classifier":
            text["labels"] = index % 3
        elif name == "t5":
            text["input_ids"], text["labels"] = ids[:prompt], ids[prompt:]
        else:
            text["labels"] = [-100] * prompt + ids[prompt:]
    return texts


def _images(count: int, seed: int, labels: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    images = [{"pixel_values": torch.randn(3, 16, 16, generator=generator)} for _ in range(count)]
    return [image | {"labels": index % 3} for index, image in enumerate(images)] if labels else images


def _texts(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 30, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def collate_batch(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads the examples of a batch to the longest."""
    inputs: dict[str, Tensor] = {}
    if "pixel_values" in batch[0]:
        inputs["pixel_values"] = torch.stack([example["pixel_values"] for example in batch])
    else:
        ids = [example["input_ids"] for example in batch]
        inputs["input_ids"] = pad(ids, 0)
        inputs["attention_mask"] = pad([[1] * len(row) for row in ids], 0)
    if "labels" in batch[0]:
        labels = [example["labels"] for example in batch]
        inputs["labels"] = pad(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels)
    return inputs
