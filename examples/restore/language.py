"""stories260K, a tiny real Llama: pruned 2:4, restored on one half of a TinyStories sample, measured on the other."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from training import VARIANTS, adapt, refill_zeros, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, default_data_collator, set_seed

from peft_variator.sparsity import PruningConfig, measure_sparsity, prune


__all__ = ["METHODS", "LanguageModel"]

METHODS = ("wanda", "sparsegpt")
LENGTH, CALIBRATION, BATCH_SIZE, LEARNING_RATE = 256, 64, 8, 2e-3


class LanguageModel:
    """The model, its text, and what is done with them.

    Args:
        data: folder that holds `stories260k` and `tinystories_sample`.
        steps: optimizer steps of a restoration.
        evaluated: windows of 256 tokens to measure on.
    """

    def __init__(self, data: Path, steps: int, evaluated: int) -> None:
        self.data, self.steps, self.evaluated = data, steps, evaluated
        self.dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(data / "stories260k" / "hf").eval()

    @cached_property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows of tokens, (windows, 256), of the first and of the second half of the stories."""
        text = (self.data / "tinystories_sample" / "tinystories_sample.txt").read_text(encoding="utf-8")
        stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
        tokenizer = AutoTokenizer.from_pretrained(self.data / "stories260k" / "hf")
        middle = len(stories) // 2
        first, second = (_windows(tokenizer, half) for half in (stories[:middle], stories[middle:]))
        return first, second[: self.evaluated]

    @torch.no_grad()
    def loss(self, model: torch.nn.Module) -> float:
        """Mean negative log-likelihood of a token of the second half, in nats."""
        model.eval()
        held_out = self.halves[1]
        losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in held_out.split(16)]
        return sum(losses) / len(held_out)

    def prune(self, method: str, seed: int) -> PreTrainedModel:
        """The model, pruned 2:4."""
        pruned, first = copy.deepcopy(self.dense), self.halves[0]
        chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
        batches = [{"input_ids": batch} for batch in first[chosen].split(16)]
        prune(pruned, PruningConfig(method=method, pattern="2:4"), batches, progress=False)
        return pruned

    def run(self, method: str, variant: str, seed: int) -> dict[str, Any]:
        """Prune, restore (variants but "pruned" and "dense"), merge, measure."""
        if variant == "dense":
            return self._measured(self.dense)
        pruned = self.prune(method, seed)
        if variant == "pruned":
            return self._measured(pruned)
        set_seed(seed)
        rows = [{"input_ids": row, "labels": row} for row in self.halves[0]]
        how = VARIANTS[variant]
        model = adapt(copy.deepcopy(pruned), how.masked)
        train(
            model,
            how.weights,
            copy.deepcopy(self.dense) if how.distilled else None,
            rows,
            default_data_collator,
            steps=self.steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            seed=seed,
        )
        parameters = model.get_nb_trainable_parameters()[0]
        merged = model.merge_and_unload(safe_merge=True)
        found = {"trained_parameters": parameters, "steps": self.steps, **self._measured(merged)}
        if not how.masked:
            refill_zeros(merged, pruned)
            found["loss_with_zeros_put_back"] = self.loss(merged)
        return found

    def _measured(self, model: PreTrainedModel) -> dict[str, Any]:
        blocks = [row for row in measure_sparsity(model, "2:4").modules if ".layers." in f".{row.name}"]
        return {
            "loss": self.loss(model),
            "sparsity": sum(row.zeros for row in blocks) / sum(row.weights for row in blocks),
            "pattern_met": all(row.pattern_met for row in blocks),
            "tokens": self.halves[1].numel(),
        }


def _windows(tokenizer: Any, stories: list[str]) -> torch.Tensor:
    """The stories one after the other, each with its start token, cut into windows."""
    tokens = [token for ids in tokenizer(stories)["input_ids"] for token in ids]
    return torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
