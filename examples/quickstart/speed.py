"""How much faster the base runs with a plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from evaluation import MAX_TOKENS
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_variator.profiling import Measurement, compare


__all__ = ["TIMED_BATCH", "count_steps", "measure_speed"]

TIMED_BATCH = 32


def measure_speed(
    base: nn.Module,
    plugin: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    ratios: list[int],
    *,
    batch_size: int,
    rounds: int,
    on_step: Callable[[], object],
) -> list[Measurement]:
    """FLOPs and seconds of base and plugin, in turn, on a batch of `batch_size` × `MAX_TOKENS` real tokens.

    The batch has no padding. Where there is some, a plugin gains more than is shown here, since it never computes it.

    Args:
        base: the untouched model.
        plugin: the same weights with a plugin.
        tokenizer: their tokenizer.
        texts: the batch is cut from these, one after the other.
        ratios: compression ratios.
        batch_size: sequences in the batch.
        rounds: timed samples of each.
        on_step: called `count_steps` times.

    Returns:
        The base's figures, then those of each ratio.

    Raises:
        ValueError: the texts do not fill the batch.
    """
    windows = tokenizer(" ".join(texts), truncation=True, max_length=MAX_TOKENS, return_overflowing_tokens=True)[
        "input_ids"
    ][:-1]
    if len(windows) < batch_size:
        raise ValueError(f"The texts fill {len(windows)} sequences of {MAX_TOKENS} tokens; {batch_size} are needed.")
    input_ids = torch.tensor(windows[:batch_size])
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return compare(base, plugin, inputs, ratios, rounds=rounds, device=torch.device("cpu"), on_step=on_step)


def count_steps(ratios: list[int], rounds: int) -> int:
    """How often `measure_speed` calls its `on_step`."""
    return (1 + len(ratios)) * (1 + rounds)
