"""Random inputs of a given shape, and how many tokens a model has positions for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig

from ..models import Task, takes_sound, takes_videos


__all__ = ["Lengths", "count_positions", "make_inputs", "make_lengths", "without_padding"]

Lengths = Literal["even", "uneven"]

SAMPLES = 160_000  # of a recording for models that take samples: ten seconds at their 16 kHz


def count_positions(config: PreTrainedConfig) -> int | None:
    """Most tokens in a sequence, special tokens included; None for a model whose positions are relative.

    RoBERTa and its kin number their positions from the one after the padding's, so they have fewer than their
    configuration says: 512 of 514.

    Args:
        config: the model's configuration; of a model with several towers that of its text counts.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    # Of some towers only transformers' class of the whole is known; none of them numbers positions from the padding's.
    if positions is None or type(text) not in MODEL_MAPPING:
        return positions
    with torch.device("meta"):
        modules = AutoModel.from_config(text).named_modules()
    reserved = [
        module.padding_idx + 1
        for name, module in modules
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return positions - max(reserved, default=0)


def make_lengths(batch: int, length: int, lengths: Lengths, generator: torch.Generator) -> Tensor:
    """Numbers of real tokens, int64 of shape (batch,).

    Args:
        batch: number of sequences.
        length: tokens of the longest one, which is the first.
        lengths: `"even"` gives all of them `length`; `"uneven"` draws the others uniformly, from a quarter of it up.
        generator: source of randomness.

    Raises:
        ValueError: `batch` or `length` is below 1.
    """
    for name, value in {"batch": batch, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if lengths == "even":
        return torch.full((batch,), length)
    drawn = torch.randint(max(1, length // 4), length + 1, (batch,), generator=generator)
    drawn[0] = length
    return drawn


def make_inputs(
    config: PreTrainedConfig, task: Task, lengths: Tensor, *, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """Keyword arguments of one forward, on the CPU.

    Text is drawn uniformly from the vocabulary without its special tokens and comes with an attention mask, as from a
    tokenizer; padding is on the right, for causal models on the left. A causal model is asked for what `generate` asks
    for in its first step: the cache and the logits of the last position. A sequence-to-sequence model is asked for the
    first decoder step. Sound is as long as Whisper takes it, 30 seconds; samples are those of ten seconds.

    Args:
        config: the model's configuration.
        task: how it is used.
        lengths: number of real tokens of each sequence, shape (batch,); of images and sound only the batch counts.
        dtype: type of images and sound.
        generator: source of randomness.

    Raises:
        ValueError: the longest sequence is longer than the model's positions, nothing tells what the features of
            sound look like, or the model takes videos.
    """
    if takes_videos(config):
        raise ValueError(
            f"{config.model_type!r} takes videos, and inputs are made of texts, images and sound alone. Measure it on "
            "inputs of your own with peft_variator.profiling.compare."
        )
    if task == "vision" and "spatial_shapes" in inspect.signature(MODEL_MAPPING[type(config)].forward).parameters:
        return _make_patches(config, len(lengths), dtype, generator)
    if task == "vision":
        height, width = config.image_size if isinstance(config.image_size, (tuple, list)) else [config.image_size] * 2
        pixels = torch.randn(len(lengths), config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(dtype)}
    inputs: dict[str, Any]
    if takes_sound(config):
        inputs = {name: sound.to(dtype) for name, sound in _make_sound(config, len(lengths), generator).items()}
    else:
        inputs = dict(_make_text(config, lengths, generator, left=task == "causal"))
    if task == "causal":
        inputs |= {"use_cache": True, "logits_to_keep": 1}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = torch.zeros(len(lengths), 1, dtype=torch.long)
    return inputs


def _make_patches(
    config: PreTrainedConfig, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Square images for models that take them as rows of patches, shape (batch, patches, values), without padding."""
    side = int(config.num_patches**0.5)
    pixels = torch.randn(batch, side**2, config.num_channels * config.patch_size**2, generator=generator)
    return {
        "pixel_values": pixels.to(dtype),
        "pixel_attention_mask": torch.ones(batch, side**2, dtype=torch.long),
        "spatial_shapes": torch.full((batch, 2), side),
    }


def _make_sound(config: PreTrainedConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise as `input_features` of shape (batch, mel bins, frames), or as `input_values`, shape (batch, samples)."""
    name = MODEL_MAPPING[type(config)].main_input_name
    if name == "input_values":
        return {name: torch.randn(batch, SAMPLES, generator=generator)}
    bins, frames = (getattr(config, field, None) for field in ("num_mel_bins", "max_source_positions"))
    if bins is None or frames is None:
        raise ValueError(
            f"What the features of sound look like for {config.model_type!r} is not known. Measure it on inputs of "
            "your own with peft_variator.profiling.compare."
        )
    return {name: torch.randn(batch, bins, 2 * frames, generator=generator)}  # the first convolutions halve them


def _make_text(
    config: PreTrainedConfig, lengths: Tensor, generator: torch.Generator, *, left: bool
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 of shape (batch, longest)."""
    facts = config.get_text_config().to_dict()
    longest = int(lengths.max())
    positions = count_positions(config)
    if positions is not None and longest > positions:
        raise ValueError(f"length is {longest}; the model has {positions} positions. Choose a shorter one.")
    special = {value for name, value in facts.items() if name.endswith("_token_id") and isinstance(value, int)}
    words = torch.tensor([token for token in range(facts["vocab_size"]) if token not in special])
    tokens = words[torch.randint(len(words), (len(lengths), longest), generator=generator)]
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": tokens.masked_fill(mask == 0, facts.get("pad_token_id") or 0), "attention_mask": mask}


def without_padding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with every padded position taken for a real token."""
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
