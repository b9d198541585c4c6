"""What two processes do that train above a packed base, through DDP and FSDP2: `work`.

Every process sees its half of each batch; `train_alone` sees all of it, in a plain loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from peft_variator import SparseLoraConfig, VariatorConfig

from .models import tiny_llama


CONFIGS = {
    "sparse_lora": SparseLoraConfig(r=4),
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "variator": VariatorConfig(compression_ratio=2, bottleneck_dim=4),
}
STEPS, MICRO_BATCHES, PROCESSES = 3, 2, 2


def build(folder: Path | None, method: str) -> PeftModel:
    """An adapter that is not zero, in float64, on the packed model of a folder, or on the dense one."""
    base = tiny_llama() if folder is None else AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, copy.deepcopy(CONFIGS[method]))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def batches() -> Iterator[dict[str, Tensor]]:
    """The whole batches, 8 rows each."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(1, 64, (8, 10), generator=generator)
        # a prompt, which Variator plugins compress, and its answer
        yield {"input_ids": ids, "labels": ids.masked_fill(torch.arange(10) < 6, -100)}


def share(batch: dict[str, Tensor], rank: int) -> list[dict[str, Tensor]]:
    """The micro-batches of one process."""
    rows = [{name: tensor[i::4] for name, tensor in batch.items()} for i in range(PROCESSES * MICRO_BATCHES)]
    return rows[rank::PROCESSES]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """SGD, so that a wrong scale of the gradients shows."""
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def train_alone(model: PeftModel) -> dict[str, Tensor]:
    """A plain loop over whole batches; gives the weights."""
    optimizer = optimizer_of(model)
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def train_ddp(folder: Path, method: str) -> dict[str, Tensor]:
    """Accelerate's loop with gradient accumulation."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    model = build(folder, method)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    for batch in batches():
        for micro_batch in share(batch, accelerator.process_index):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**micro_batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.get_state_dict(prepared)


def shard(model: PeftModel, efficient: bool, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """FSDP2 as Accelerate prepares it, which by itself chooses DDP on CPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=efficient,
        mixed_precision_policy=policy,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=torch.distributed.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def local_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())


def train_fsdp(folder: Path | None, method: str, efficient: bool) -> dict[str, Tensor]:
    """A loop above sharded weights; gives the whole ones, and the bytes of this process's share."""
    model = shard(build(folder, method), efficient)
    held = local_bytes(model)
    optimizer = optimizer_of(model)
    for batch in batches():
        for micro_batch in share(batch, torch.distributed.get_rank()):
            (model(**micro_batch).loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {**weights, "held": torch.tensor(held)}


def run_in_bfloat16(folder: Path) -> dict[str, Tensor]:
    """Logits under a policy that computes in bfloat16: positions are no numbers and must not be cast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = shard(build(folder, "sparse_lora"), efficient=False, policy=policy)
    with torch.no_grad():
        return {"logits": model(input_ids=next(batches())["input_ids"]).logits}


def work(rank: int, folder: str, output: str) -> None:
    """All runs, one after the other; the first process writes what they gave."""
    packed = Path(folder)
    results = {("ddp", method): train_ddp(packed, method) for method in CONFIGS}
    results |= {("fsdp", method): train_fsdp(packed, method, efficient=False) for method in CONFIGS}
    results["fsdp", "sparse_lora, loaded by one process"] = train_fsdp(packed, "sparse_lora", efficient=True)
    results["fsdp", "variator on dense"] = train_fsdp(None, "variator", efficient=False)
    results["fsdp", "bfloat16"] = run_in_bfloat16(packed)
    if rank == 0:
        torch.save(results, Path(output, "results.pt"))
