"""ECoFLaP (Sung et al., arXiv 2310.02998): how much the loss depends on each block, and how much that may lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.modeling import has_offloaded_params
from rich.progress import Progress
from torch import Tensor, nn

from .chains import Batch, run_model
from .config import PruningConfig
from .modules import PrunableModule, apply_matrix, read_matrix
from .sequential import TargetsByBlock


__all__ = ["block_scores", "first_order_scores", "spread_budgets", "water_fill", "zeroth_order_scores"]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss the model computes from the batch's labels."""
    output = run_model(model, batch)
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(loss, Tensor):
        raise ValueError(
            "allocation='ecoflap' scores blocks by the model's loss, but the calibration batches give none. Add "
            "labels to them (for a causal language model: labels=input_ids)."
        )
    if not torch.isfinite(loss):
        raise ValueError(f"The loss on a calibration batch is {loss.item()}: check its labels and the model's dtype.")
    return loss.float().mean()


@contextmanager
def _only_trainable(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients be computed for `parameters` alone; flags and gradients are put back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def first_order_scores(
    model: nn.Module, targets: TargetsByBlock, batches: Sequence[Batch], bar: Progress
) -> dict[str, float]:
    """Sum over a block's weights of |w * dL/dw|, mean over the batches.

    Each gradient is summed up and dropped as soon as it is there: one at a time exists.

    Raises:
        ValueError: a weight is offloaded (accelerate computes no gradients for it), or there is no finite loss.
    """
    scores = dict.fromkeys(targets, 0.0)
    with ExitStack() as stack:
        modules = [target.module for block in targets.values() for target in block]
        if any(has_offloaded_params(module) for module in modules):
            raise ValueError("score_order='first' needs gradients, and offloaded weights get none. Use 'zeroth'.")
        stack.enter_context(_only_trainable(model, [module.weight for module in modules]))
        for block, members in targets.items():
            for member in members:

                def count(weight: Tensor, block: str = block) -> None:
                    if weight.grad is not None:
                        scores[block] += float((weight.detach().float() * weight.grad.float()).abs().sum())
                        weight.grad = None

                stack.callback(member.module.weight.register_post_accumulate_grad_hook(count).remove)
        for batch in bar.track(batches, description="scoring blocks by gradients"):
            with torch.enable_grad():
                _loss(model, batch).backward()
    return {block: score / len(batches) for block, score in scores.items()}


@contextmanager
def _perturbed(targets: Sequence[PrunableModule], scale: float, seed: int) -> Iterator[None]:
    """Run the model as if `scale` times standard normal noise were added to the weights; the same noise for one seed.

    Layers are linear in their weights, so adding the noise's own output is the same, and no weight is touched.
    """
    with ExitStack() as stack:
        for index, target in enumerate(targets):

            def add(module: nn.Module, args: Any, output: Tensor, index: int = index, target: Any = target) -> Tensor:
                generator = torch.Generator(device=output.device).manual_seed(seed + index)
                shape = (output.shape[-1], target.width)
                noise = torch.randn(shape, generator=generator, device=output.device, dtype=output.dtype)
                return output + scale * apply_matrix(target, args[0], noise, with_bias=False)

            stack.callback(target.module.register_forward_hook(add).remove)
        yield


def zeroth_order_scores(
    model: nn.Module, targets: TargetsByBlock, batches: Sequence[Batch], perturbation: float, seed: int, bar: Progress
) -> dict[str, float]:
    """Sum over a block's weights of |w|, times an estimate of the root mean square of dL/dw in the block.

    With z standard normal on the block's n weights, |L(W + eps z) - L(W - eps z)| / (2 eps) estimates the norm of the
    gradient (the paper's zeroth-order gradient, two forward passes a batch); its share for one weight is that over
    sqrt(n). So it is on the scale of `first_order_scores`, also between blocks of different sizes.

    Args:
        model: the model.
        targets: block -> its modules.
        batches: calibration batches with labels.
        perturbation: eps.
        seed: seed of z; each batch and block takes other noise.
        bar: shows the progress.

    Raises:
        ValueError: there is no finite loss.
    """
    scores = {}
    blocks = bar.track(list(targets.items()), description="scoring blocks by loss differences")
    for number, (block, members) in enumerate(blocks):
        slope = 0.0
        for step, batch in enumerate(batches):
            noise_seed = seed + 1_000_003 * (number * len(batches) + step)
            with torch.no_grad():
                with _perturbed(members, perturbation, noise_seed):
                    above = _loss(model, batch)
                with _perturbed(members, -perturbation, noise_seed):
                    below = _loss(model, batch)
            slope += abs(float(above - below)) / (2 * perturbation) / len(batches)
        size = sum(member.module.weight.numel() for member in members)
        weight_sum = sum(float(read_matrix(member).float().abs().sum()) for member in members)
        scores[block] = weight_sum * slope / math.sqrt(size)
    return scores


def block_scores(
    model: nn.Module, targets: TargetsByBlock, batches: Sequence[Batch], config: PruningConfig, bar: Progress
) -> dict[str, float]:
    """The scores that `config` asks for, on its first `score_batches` batches."""
    chosen = batches[: config.score_batches]
    if config.score_order == "first":
        return first_order_scores(model, targets, chosen, bar)
    return zeroth_order_scores(model, targets, chosen, config.perturbation, config.seed, bar)


def water_fill(
    scores: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, highest: float
) -> dict[str, float]:
    """Sparsity of each block so that together they lose `sparsity` of their weights.

    A block keeps at least 1 - `highest` of its weights. What else is kept is shared out in proportion to the blocks'
    scores; a block that is full takes no more and the rest goes to the others (the coarse step of ECoFLaP, arXiv
    2310.02998: how much a part keeps follows its share of the global importance). Unlike in the released code the
    level is solved for, so the target is met to rounding instead of by rounds of additions with a repair.

    Args:
        scores: block -> importance summed over its weights, >= 0.
        sizes: block -> number of weights.
        sparsity: fraction of all weights removed, at most `highest`.
        highest: largest fraction removed from a block.

    Returns:
        block -> fraction removed, in [0, `highest`].

    Raises:
        ValueError: a score is negative or not finite, or none is positive.
    """
    names = list(sizes)
    score = torch.tensor([scores[name] for name in names], dtype=torch.float64)
    size = torch.tensor([sizes[name] for name in names], dtype=torch.float64)
    if not torch.isfinite(score).all() or (score < 0).any() or not (score > 0).any():
        raise ValueError(
            f"Block scores must be finite and not negative, with one above 0, but are {dict(scores)}. The loss on the "
            "calibration data does not depend on the weights, or overflows: check the labels and the dtype."
        )
    floor = size * (1.0 - highest)
    kept = floor + _fill(score, size - floor, float(size.sum() * (1.0 - sparsity) - floor.sum()))
    return dict(zip(names, (1.0 - kept / size).clamp(0.0, highest).tolist(), strict=True))


def _fill(score: torch.Tensor, room: torch.Tensor, amount: float) -> torch.Tensor:
    """Share `amount` out as min(room, level * score); blocks without score share what is left by their room."""
    filled = torch.zeros_like(room)
    open_ = score > 0
    while open_.any() and amount > 0:
        share = torch.where(open_, score / score[open_].sum() * amount, 0.0)
        full = open_ & (share >= room)
        if not full.any():
            return filled + share
        filled = torch.where(full, room, filled)
        amount -= float(room[full].sum())
        open_ &= ~full
    rest = torch.where(score > 0, 0.0, room)
    total = float(rest.sum())
    return filled + rest * (max(amount, 0.0) / total) if total > 0 else filled


def spread_budgets(targets: Sequence[PrunableModule], budgets: Mapping[str, float]) -> list[PrunableModule]:
    """The targets with their block's sparsity, each module to a whole number of weights.

    The roundings are carried from module to module, so that their sum is off by less than one weight.
    """
    spread, wanted, lost = [], 0.0, 0
    for target in targets:
        size = target.module.weight.numel()
        wanted += budgets[target.block] * size
        count = min(max(int(wanted + 0.5) - lost, 0), size - 1)
        lost += count
        spread.append(replace(target, target=count / size))
    return spread
