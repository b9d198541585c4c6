"""Training runs to be started on several processes: `distributed_run.py OUTPUT_DIR BATCH_SIZE [HOW]`.

HOW is the type of state dict that FSDP2 saves, and the weights are sharded; or `die MODEL`, and such a type after it:
the second process ends in the middle. The first process writes what happened to `OUTPUT_DIR/results.pt`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from training_cases import build_base, collate_batch, make_examples
from transformers import PreTrainedModel, TrainerCallback, set_seed

from peft_variator import SparseLoraConfig, VariatorConfig
from peft_variator.sparsity import PruningConfig, prune
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


MODELS = {"bert-classifier": "BertLayer", "gpt2": "GPT2Block", "llama": "LlamaDecoderLayer"}
"""Models and their blocks. The last one is pruned, and has a SparseLoRA adapter; the others have plugins."""


def base_of(name: str) -> PreTrainedModel:
    """The base of a model, in float64."""
    base = build_base(name)
    if name == "llama":
        prune(base, PruningConfig(method="magnitude", pattern="2:4"), progress=False)
    return base.double()


def build(name: str) -> PeftModel:
    """A model with an adapter that is not zero, always the same one."""
    set_seed(1)
    if name == "llama":
        config = SparseLoraConfig(r=4, init_lora_weights=False)
    else:
        config = VariatorConfig(bottleneck_dim=4, init_weights=False)
    return get_peft_model(base_of(name), config)


def shard_on_cpus() -> None:
    """Have Accelerate, which turns to FSDP for GPUs alone and else runs DDP, take these processes for such.

    What it does then, FSDP2 over gloo included, is the same on CPUs.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which this process may hold a part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    output: Path,
    name: str,
    batch_size: int,
    checkpoint: Path | None = None,
    state_dict_type: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train on batches of 8 in all, by SGD so that a wrong scale of the gradients shows in the weights.

    Args:
        output: folder of the run.
        name: which of `MODELS`.
        batch_size: rows at once on this process.
        checkpoint: where to go on.
        state_dict_type: what FSDP2 saves; `None`: the weights are not sharded.
        callbacks: more of them.

    Returns:
        dict[str, Any]: the log, the weights, the ratios of each micro-batch `(processes, micro-batches)`, and the
            share of the weights that each process held.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = DistillationConfig(
        output_dir=str(output),
        max_steps=4,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=8 // (batch_size * processes),
        hidden_weight=1.0,
        logits_weight=0.5,
        task_weight=0.3,
        ratios=None if name == "llama" else [2, 4],
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        disable_tqdm=True,
        fsdp=state_dict_type is not None,
        # Accelerate (1.15) by itself shards BERT's embeddings twice, and stops.
        fsdp_config={"state_dict_type": state_dict_type, "transformer_layer_cls_to_wrap": MODELS[name]},
    )
    if state_dict_type:
        shard_on_cpus()
    recorder = Recorder()
    trainer = DistillationTrainer(
        build(name),
        config,
        train_dataset=make_examples(name, count=24),
        eval_dataset=make_examples(name, count=7, seed=1),
        data_collator=collate_batch,
        callbacks=[recorder, *callbacks],
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    )
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(output / "adapter"))
    parameters = dict(trainer.model.named_parameters())
    weights = {key: whole(value) for key, value in parameters.items()}
    gather = trainer.accelerator.gather
    held = [value.to_local() if isinstance(value, DTensor) else value for value in parameters.values()]
    return {
        "share": sum(part.numel() for part in held) / sum(value.numel() for value in weights.values()),
        "log": trainer.state.log_history,
        "ratios": gather(torch.tensor(recorder.ratios)).view(config.world_size, -1).tolist(),
        "weights": weights,
        "moved": {key for key, value in weights.items() if not value.equal(before[key])},
        "sums": gather(torch.stack([value.sum() for value in weights.values()])).view(config.world_size, -1),
    }


class Death(TrainerCallback):
    """Ends the second process without a word before its third step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if args.process_index == 1 and state.global_step == 2:
            os._exit(7)


def main(output: Path, batch_size: int, how: str | None = None, *dying: str) -> None:
    """Train each of the models, and a second time from the middle."""
    if how == "die":
        name, *sharded = dying
        train(output / name, name, batch_size, state_dict_type=next(iter(sharded), None), callbacks=[Death()])
        return
    results = {}
    for name in MODELS:
        results[name] = train(output / name, name, batch_size, state_dict_type=how)
        if how or name != "bert-classifier":  # which has the method of the next one
            middle = output / name / "checkpoint-2"
            results[f"{name}, resumed"] = train(output / name, name, batch_size, middle, how)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, output / "results.pt")


def work(_rank: int, output: str) -> None:
    """The runs in one of two processes that no launcher has started."""
    main(Path(output), 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
