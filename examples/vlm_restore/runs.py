"""One run: prune the base, restore it, merge, count its answers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accuracy import measure_accuracy
from data import Collator, Example, load_split, single_questions
from peft import LoraConfig, PeftModel, get_peft_model
from plan import CONTROL, Run
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, set_seed

from peft_variator import SparseLoraConfig
from peft_variator.sparsity import PruningConfig, SparsityReport, measure_sparsity, prune
from peft_variator.training import DistillationConfig, DistillationTrainer


__all__ = ["Study", "train"]

CALIBRATION, BATCH_SIZE, LEARNING_RATE, RANK, ALPHA, KL_WEIGHT = 128, 16, 1e-3, 8, 16, 0.1


def train(
    model: PeftModel,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    teacher: nn.Module | None = None,
    **arguments: Any,
) -> None:
    """Train an adapter in place, in bfloat16 where the processor can (accuracy is measured in float32).

    Args:
        model: with the adapter.
        examples: what it trains on.
        collate: makes batches of them.
        teacher: what it follows; without one what the adapter's kind has for one.
        **arguments: of `DistillationConfig`: steps, learning rate, weights of the losses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config = DistillationConfig(
            output_dir=scratch,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        )
        DistillationTrainer(
            model, config, teacher_model=teacher, train_dataset=examples, data_collator=collate
        ).train()


class Study:
    """The base, the data, and what is done with them.

    Args:
        data: folder of easy-VQA.
        base: folder of the trained model.
        steps: optimizer steps of a restoration, of 16 images with all of their questions.
    """

    def __init__(self, data: Path, base: Path, steps: int) -> None:
        self.data, self.steps = data, steps
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.dense = LlavaForConditionalGeneration.from_pretrained(base).eval()

    @cached_property
    def train(self) -> list[Example]:
        """The training images."""
        return load_split(self.data, "train")

    @cached_property
    def test(self) -> list[Example]:
        """The test images."""
        return load_split(self.data, "test")

    def prune(self, run: Run) -> tuple[LlavaForConditionalGeneration, SparsityReport]:
        """The base, pruned on single questions, and what was pruned."""
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(run.seed))[:CALIBRATION]
        # One question of each image, without padding's effect: a batch is a question, as a processor would give it.
        examples = [single_questions([self.train[index]])[0] for index in chosen.tolist()]
        collate = Collator(self.tokenizer)
        batches = [
            {name: batch[name] for name in ("input_ids", "pixel_values")}
            for batch in (collate([example]) for example in examples)
        ]
        config = PruningConfig(
            method="magnitude" if run.method == CONTROL else run.method,
            modality_sparsity=run.modality_sparsity,
            keep_dense=run.method == CONTROL,
            seed=run.seed,
        )
        model = copy.deepcopy(self.dense)
        return model, prune(model, config, batches, progress=False)

    def run(self, run: Run) -> dict[str, Any]:
        """All of it, and the figures."""
        pruned, report = self.prune(run)
        names = [row.name for row in report.modules]
        if run.restoration == "none":
            return self._measured(pruned, names)
        merged, parameters = self.restore(pruned, names, run)
        found = {"trained_parameters": parameters, "steps": self.steps, **self._measured(merged, names)}
        if run.restoration == "lora":
            _refill_zeros(merged, pruned, names)
            found["accuracy_with_zeros_put_back"] = measure_accuracy(merged, self.test, self.tokenizer)
        return found

    def restore(
        self, pruned: LlavaForConditionalGeneration, names: list[str], run: Run
    ) -> tuple[LlavaForConditionalGeneration, int]:
        """A copy of the pruned model with its update merged, and the parameters that were trained."""
        set_seed(run.seed)
        config = LoraConfig if run.restoration == "lora" else SparseLoraConfig
        model = get_peft_model(copy.deepcopy(pruned), config(r=RANK, lora_alpha=ALPHA, target_modules=names))
        # (1 − λ)·task + λ·KL to the dense model, λ = 0 without distillation.
        is_distilled = run.restoration.endswith("distilled")
        kl = KL_WEIGHT if is_distilled else 0.0
        train(
            model,
            self.train,
            Collator(self.tokenizer, augment=True),
            copy.deepcopy(self.dense) if is_distilled else None,
            max_steps=self.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            hidden_weight=0.0,
            logits_weight=kl,
            task_weight=1.0 - kl,
            seed=run.seed,
        )
        parameters = model.get_nb_trainable_parameters()[0]
        return model.merge_and_unload(safe_merge=True), parameters

    def _measured(self, model: nn.Module, names: list[str]) -> dict[str, Any]:
        rows = [row for row in measure_sparsity(model).modules if row.name in set(names)]
        return {
            "accuracy": measure_accuracy(model, self.test, self.tokenizer),
            "sparsity": sum(row.zeros for row in rows) / sum(row.weights for row in rows),
            "questions": sum(len(example.questions) for example in self.test),
        }


@torch.no_grad()
def _refill_zeros(merged: nn.Module, pruned: nn.Module, names: list[str]) -> None:
    """Put the zeros of the pruned model back into a merged copy."""
    for name in names:
        merged.get_submodule(name).weight.masked_fill_(pruned.get_submodule(name).weight == 0, 0.0)
