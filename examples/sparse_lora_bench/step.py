"""One training step, and what autograd keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from peft_variator.profiling import find_task, make_inputs, make_lengths


__all__ = ["kept_bytes", "make_batch", "make_loss", "step_flops"]


def make_batch(model: str, base: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens without padding: `input_ids` and `attention_mask`, int64 (batch, length)."""
    generator = torch.Generator().manual_seed(0)
    lengths = make_lengths(batch, length, "even", generator)
    inputs = make_inputs(base.config, find_task(model, base.config), lengths, dtype=base.dtype, generator=generator)
    return {name: inputs[name].to(base.device) for name in ("input_ids", "attention_mask")}


def make_loss(
    model: str, base: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> Callable[[nn.Module], torch.Tensor]:
    """Next-token cross-entropy of a causal model; the mean square of the last hidden states of an encoder."""
    if find_task(model, base.config) == "causal":
        return lambda trained: trained(**batch, labels=batch["input_ids"], use_cache=False).loss
    return lambda trained: trained(**batch).last_hidden_state.float().square().mean()


def kept_bytes(trained: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, other than the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(trained.parameters(), trained.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(trained)
    return sum(storage.nbytes() for storage in kept.values())


def step_flops(trained: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> int:
    """Floating-point operations of forward and backward in products of matrices, those of attention among them.

    Only of a model in torch's own operators: others count as nothing.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss(trained).backward()  # type: ignore[no-untyped-call]
    trained.zero_grad()
    return int(counter.get_total_flops())
