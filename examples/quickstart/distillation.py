"""Training of one plugin for several compression ratios, on plain text, against the model without it."""

from __future__ import annotations

import tempfile
from typing import Any

from evaluation import MAX_TOKENS
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from text import make_examples
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_variator.training import DistillationConfig, DistillationTrainer


__all__ = ["distil"]


class ProgressBar(TrainerCallback):
    """A bar with the steps, the last logged loss, and the time that is left; where no bar can move, lines."""

    def __init__(self, console: Console) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn()]
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("Training")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.update(self.task, total=state.max_steps)
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss = f"loss {float(logs['loss']):.3f}"
        self.progress.update(self.task, description=f"Training, {loss}")
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"Step {state.global_step} of {state.max_steps}, {loss}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.stop()


def distil(
    plugin: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    paragraphs: list[str],
    *,
    ratios: list[int],
    steps: int,
    batch_size: int,
    seed: int,
    bf16: bool,
    console: Console,
) -> list[dict[str, float]]:
    """Train the plugin to give every layer's output of the model without it (Xiao et al. 2023, section 3.3).

    Args:
        plugin: model with a fresh plugin.
        tokenizer: its tokenizer.
        paragraphs: plain text.
        ratios: compression ratios; each step draws one.
        steps: optimizer steps.
        batch_size: texts a step.
        seed: of texts, their order and the ratios.
        bf16: whether products of matrices are in bfloat16.
        console: where progress is shown.

    Returns:
        The lines of the training log, each with its `step` and `loss`.
    """
    # `Trainer` makes this folder even if nothing is to be written to it.
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DistillationTrainer(
            plugin,
            _arguments(scratch, ratios, steps, batch_size, seed, bf16),
            train_dataset=make_examples(paragraphs, tokenizer, steps * batch_size, MAX_TOKENS, seed),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[ProgressBar(console)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # What is measured and saved computes in its own precision again.
        trainer.accelerator.unwrap_model(plugin, keep_fp32_wrapper=False)
    return [line for line in trainer.state.log_history if "loss" in line]


def _arguments(
    scratch: str, ratios: list[int], steps: int, batch_size: int, seed: int, bf16: bool
) -> DistillationConfig:
    return DistillationConfig(
        output_dir=scratch,
        ratios=ratios,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        # Texts of like length share a batch, so that little of it is padding.
        train_sampling_strategy="group_by_length",
        logging_steps=min(10, steps),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
        seed=seed,
    )
