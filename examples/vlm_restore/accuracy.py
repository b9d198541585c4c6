"""How many questions a model answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from data import Collator, Example
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast


__all__ = ["measure_accuracy"]


@torch.no_grad()
def measure_accuracy(
    model: nn.Module, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, batch_size: int = 64
) -> float:
    """Share of the questions whose most likely next token, of the whole vocabulary, is the answer; in float32."""
    model.eval()
    device = next(model.parameters()).device
    right = total = 0
    for batch in DataLoader(list(examples), batch_size, collate_fn=Collator(tokenizer)):  # type: ignore[arg-type]
        moved = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        used = batch["labels"][:, 1:] != -100
        guesses = model(**moved).logits[:, :-1].argmax(-1).cpu()
        right += int((guesses[used] == batch["labels"][:, 1:][used]).sum())
        total += int(used.sum())
    return right / total
