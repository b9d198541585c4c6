"""`prune`: from a dense model, a config and calibration data to a sparse model and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .calibration import check_batches
from .chains import Batch
from .config import PruningConfig
from .ecoflap import block_scores, spread_budgets, water_fill
from .methods import PruningMethod
from .modules import PrunableModule, apply_matrix, find_prunable, find_targets, read_matrix, replace_matrix
from .patterns import Pattern, apply_mask
from .sequential import walk_blocks
from .sparsity_report import ModuleSparsity, SparsityReport, count_module
from .statistics import Statistics


__all__ = ["measure_sparsity", "prune"]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and put every module back into its mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _by_block(targets: Sequence[PrunableModule]) -> dict[str, list[PrunableModule]]:
    blocks: dict[str, list[PrunableModule]] = {}
    for target in targets:
        blocks.setdefault(target.block, []).append(target)
    return blocks


@dataclass
class _Pruner:
    """Prunes single modules and keeps the books. `hooks` outlives the walk and ends before `prune` returns."""

    config: PruningConfig
    method: PruningMethod
    hooks: ExitStack
    advance: Callable[[], None]
    entries: dict[str, ModuleSparsity] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def prune_block(self, targets: Sequence[PrunableModule], statistics: dict[str, Statistics]) -> None:
        """Prune the modules of one block; each one's statistics go when it is done."""
        for target in targets:
            self.prune_module(target, statistics.pop(target.name))

    def prune_module(self, target: PrunableModule, statistics: Statistics | None) -> None:
        """Choose the module's mask, and zero its weights or note the mask."""
        weight = read_matrix(target)
        if not torch.isfinite(weight).all():
            raise ValueError(f"The weight of {target.name!r} holds NaN or infinite values: the checkpoint is broken.")
        mask, pruned = self.method.solve(weight, statistics, target.target)
        if self.config.keep_dense:
            pruned = apply_mask(weight, mask)
            self.masks[target.name] = (mask.T if target.transposed else mask).cpu().contiguous()
            self._stand_in(target, mask.cpu())
        else:
            replace_matrix(target, pruned)
        self.entries[target.name] = _entry(target, pruned)
        self.advance()

    def _stand_in(self, target: PrunableModule, mask: Tensor) -> None:
        """Let the module run as if it were pruned until the walk is over; its weight stays as it is."""
        if not self.config.propagate:
            return

        def masked(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            weight = read_matrix(target)
            return apply_matrix(target, args[0], apply_mask(weight, mask.to(weight.device)))

        self.hooks.callback(target.module.register_forward_hook(masked).remove)


def _entry(target: PrunableModule, matrix: Tensor) -> ModuleSparsity:
    pattern = target.target if isinstance(target.target, Pattern) else None
    goal = target.target.sparsity if isinstance(target.target, Pattern) else target.target
    shape = tuple(target.module.weight.shape)
    return count_module(target.name, target.block, target.modality, matrix, pattern, shape=shape, target=goal)


def _allocate(
    model: nn.Module, targets: list[PrunableModule], batches: list[Batch], config: PruningConfig, bar: Progress
) -> list[PrunableModule]:
    """The targets with ECoFLaP's budgets."""
    blocks = _by_block(targets)
    scores = block_scores(model, blocks, batches, config, bar)
    sizes = {name: sum(target.module.weight.numel() for target in members) for name, members in blocks.items()}
    return spread_budgets(targets, water_fill(scores, sizes, float(config.sparsity or 0.0), config.max_block_sparsity))


def prune(
    model: nn.Module, config: PruningConfig, calibration: Iterable[Batch] | None = None, *, progress: bool = True
) -> SparsityReport:
    """Prune `model` in place, block by block.

    The walk holds the statistics of one block at a time. Which blocks there are, and how one feeds the next, is read
    from a forward pass, so any model built from `nn.ModuleList`s of blocks is walked block by block, and any other one
    module by module. Models in bfloat16 and float16, and models that accelerate has spread over devices, the CPU or
    disk are pruned as they are; statistics are float32 or better.

    Args:
        model: any `nn.Module`. It runs in evaluation mode; its modes are restored.
        config: what to prune, how much, by which method.
        calibration: batches for the model: dicts of its keyword arguments, or tensors. They are read once and kept, so
            a generator is fine. Not needed for magnitude pruning. 128 sequences are usual. Padding is left out of the
            statistics where the batches have an `attention_mask`.
        progress: show a progress bar where the error stream is a terminal.

    Returns:
        The zeros of every pruned module. With `keep_dense=True` the weights are as before and `masks` holds the masks.

    Raises:
        ValueError: nothing to prune; a target has no weight; a pattern does not divide a width; the calibration data
            is missing, empty, holds NaN, or does not reach a module; weights hold NaN. What can be checked without
            running the model is checked before the first weight changes.
        TypeError: a batch is neither a mapping nor a tensor.
    """
    config.check()
    targets = find_targets(model, config)
    method = config.pruning_method
    statistics = method.statistics
    batches: list[Batch] = []
    if calibration is not None or statistics is not None or config.allocation == "ecoflap":
        batches = check_batches(calibration)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        console = Console(stderr=True)
        is_shown = progress and console.is_terminal
        bar = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not is_shown))
        if config.allocation == "ecoflap":
            targets = _allocate(model, targets, batches, config, bar)
        task = bar.add_task(f"pruning ({method.name})", total=len(targets))
        pruner = _Pruner(config, method, stack, lambda: bar.advance(task))
        if statistics is None:
            for target in targets:
                pruner.prune_module(target, None)
        else:
            walk_blocks(model, _by_block(targets), batches, statistics, pruner.prune_block, config.propagate)
    entries = [pruner.entries[target.name] for target in targets]
    return SparsityReport(entries, {"config": config.to_dict()}, pruner.masks)


def measure_sparsity(
    model: nn.Module, pattern: str | None = None, modality_modules: Mapping[str, list[str]] | None = None
) -> SparsityReport:
    """Count the zeros of every Linear and Conv1D of a model in memory.

    Args:
        model: any `nn.Module`.
        pattern: n:m pattern to check for.
        modality_modules: names modalities by modules, as in `PruningConfig`.

    Raises:
        ValueError: the pattern is malformed, or a module name is unknown.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    entries = []
    for target in find_prunable(model, modality_modules):
        matrix, shape = read_matrix(target), tuple(target.module.weight.shape)
        entries.append(count_module(target.name, target.block, target.modality, matrix, wanted, shape=shape))
    return SparsityReport(entries, {"model": type(model).__name__})
