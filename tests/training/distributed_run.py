"""Training runs to be started on several processes: `distributed_run.py OUTPUT_DIR BATCH_SIZE`.

The first process writes what happened to `OUTPUT_DIR/results.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from training_cases import build_plugin, collate_batch, make_examples
from transformers import TrainerCallback

from peft_variator.training import DistillationConfig, DistillationTrainer
from peft_variator.tuners.variator import VariatorLayer


class Recorder(TrainerCallback):
    """Records the ratio at the end of every micro-batch."""

    def __init__(self) -> None:
        self.ratios: list[int] = []

    def on_substep_end(self, args, state, control, model, **kwargs) -> None:
        self.ratios += {
            m.rule_at("default", m.ratios.chosen.get("default")).ratio
            for m in model.modules()
            if isinstance(m, VariatorLayer)
        }

    on_pre_optimizer_step = on_substep_end


MODELS = ("bert-classifier", "gpt2")


def train(output: Path, name: str, batch_size: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train on batches of 8 in all, by sgd so that a wrong scale of the gradients shows in the weights.

    Returns:
        dict[str, Any]: the log, the weights and the ratios of each micro-batch, `(processes, micro-batches)`.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = DistillationConfig(
        output_dir=str(output),
        max_steps=4,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=8 // (batch_size * processes),
        optim="sgd",
        learning_rate=0.1,
        hidden_weight=1.0,
        logits_weight=0.5,
        task_weight=0.3,
        ratios=[2, 4],
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        disable_tqdm=True,
    )
    recorder = Recorder()
    trainer = DistillationTrainer(
        build_plugin(name, init_weights=False).double(),
        config,
        train_dataset=make_examples(name, count=24),
        eval_dataset=make_examples(name, count=7, seed=1),
        data_collator=collate_batch,
        callbacks=[recorder],
    )
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = {key: value.detach() for key, value in trainer.model.named_parameters()}
    gather = trainer.accelerator.gather
    return {
        "log": trainer.state.log_history,
        "ratios": gather(torch.tensor(recorder.ratios)).view(config.world_size, -1).tolist(),
        "weights": weights,
        "moved": {key for key, value in weights.items() if not value.equal(before[key])},
        "sums": gather(torch.stack([value.sum() for value in weights.values()])).view(config.world_size, -1),
    }


def main(output: Path, batch_size: int) -> None:
    """Train each of the models, and the last one a second time from the middle."""
    results = {name: train(output / name, name, batch_size) for name in MODELS}
    last = output / MODELS[-1]
    results["resumed"] = train(last, MODELS[-1], batch_size, last / "checkpoint-2")
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, output / "results.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
