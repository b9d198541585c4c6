"""Which modules of a model are pruned, and to what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..bases import Sparse24Linear
from ..compat import is_quantized_tensor
from .config import PruningConfig
from .modalities import DEFAULT_OFF, Modalities, block_stacks, innermost
from .patterns import Pattern, Target, check_width


__all__ = ["PrunableModule", "find_prunable", "find_targets", "matches"]


@dataclass(frozen=True)
class PrunableModule:
    """A Linear or Conv1D of the model.

    `block` is the name of its block in the outermost `ModuleList`, or its own name outside of one; `target` is what it
    is pruned to.
    """

    name: str
    module: nn.Linear  # or Conv1D, which has the same attributes
    block: str
    modality: str
    in_stack: bool
    target: Target = 0.0

    @property
    def transposed(self) -> bool:
        """Whether the weight lies as (in_features, out_features): GPT-2's Conv1D."""
        return isinstance(self.module, Conv1D)

    @property
    def width(self) -> int:
        """The number of inputs."""
        return self.module.weight.shape[0 if self.transposed else 1]


def matches(name: str, wanted: list[str] | str) -> bool:
    """Whether module `name` is meant: by its whole name or last parts (a list), or by a regex over the whole name."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith("." + item) for item in wanted)


def find_prunable(model: nn.Module, named: Mapping[str, list[str]] | None = None) -> list[PrunableModule]:
    """Every Linear and Conv1D of `model`, in the order of its modules.

    Args:
        model: the model.
        named: `PruningConfig.modality_modules`.
    """
    modalities = Modalities(model, named)
    blocks = [block for stack in block_stacks(model).values() for block in stack]
    found = []
    for name, module in model.named_modules():
        # the out_proj of nn.MultiheadAttention is no layer: its weight is read and its forward never called
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear):
            block = innermost(name, blocks)
            found.append(PrunableModule(name, module, block or name, modalities.of(name), block is not None))
    return found


def _check_matched(model: nn.Module, wanted: list[str] | str, prunable: list[PrunableModule]) -> None:
    """Every entry of target_modules must mean at least one module that has a weight to prune."""
    for item in [wanted] if isinstance(wanted, str) else wanted:
        entry: list[str] | str = item if isinstance(wanted, str) else [item]
        if any(matches(target.name, entry) for target in prunable):
            continue
        others = [name for name, _ in model.named_modules() if matches(name, entry)]
        found = f"matches {others[:3]}, which have no weight to prune" if others else "matches no module of the model"
        ends = sorted({target.name.rpartition(".")[2] for target in prunable})
        raise ValueError(
            f"target_modules: {item!r} {found}. Only Linear and Conv1D can be pruned; the names here end in {ends}."
        )


def _check_weight(target: PrunableModule) -> None:
    if isinstance(target.module, Sparse24Linear):
        raise ValueError(
            f"{target.name!r} is a packed 2:4 layer, whose zeros are fixed. Make the model dense first, with "
            "`peft-variator unpack` or, in memory, with model.dequantize(), and prune that."
        )
    weight = target.module.weight
    if weight.numel() == 0:
        raise ValueError(
            f"{target.name!r} has an empty weight {tuple(weight.shape)}. Exclude it with exclude_modules."
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or is_quantized_tensor(weight):
        kind = type(weight).__name__ if is_quantized_tensor(weight) else weight.dtype
        raise ValueError(
            f"The weight of {target.name!r} is stored as {kind}. Prune the model in float32, bfloat16 or "
            "float16, and quantise afterwards."
        )
    if isinstance(target.target, Pattern):
        check_width(target.name, target.width, target.target)


def _check_modalities(config: PruningConfig, prunable: list[PrunableModule]) -> None:
    present = {target.modality for target in prunable}
    for modality in config.modality_sparsity or config.modalities or ():
        if modality not in present:
            raise ValueError(
                f"The model has no Linear or Conv1D of modality {modality!r}; it has {sorted(present)}. Name its "
                "modules with modality_modules."
            )


def _is_wanted(target: PrunableModule, config: PruningConfig, has_stacks: bool) -> bool:
    if config.exclude_modules is not None and matches(target.name, config.exclude_modules):
        return False
    named = config.modality_sparsity or config.modalities
    if target.modality not in named if named is not None else target.modality in DEFAULT_OFF:
        return False
    if config.target_modules is not None:
        return matches(target.name, config.target_modules)
    return target.in_stack or not has_stacks or (named is not None and target.modality in DEFAULT_OFF)


def find_targets(model: nn.Module, config: PruningConfig) -> list[PrunableModule]:
    """The modules that `config` prunes, each with its target (ECoFLaP's budgets come later).

    Raises:
        ValueError: nothing matches, an entry of `target_modules` has no weight, a pattern does not divide a width, a
            modality is not in the model, the model carries adapters, or its weights are quantised.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model carries PEFT adapters. Merge or unload them, then prune the plain model.")
    prunable = find_prunable(model, config.modality_modules)
    if config.target_modules is not None:
        _check_matched(model, config.target_modules, prunable)
    _check_modalities(config, prunable)
    has_stacks = any(target.in_stack for target in prunable)
    wanted = [target for target in prunable if _is_wanted(target, config, has_stacks)]
    if not wanted:
        present = sorted({target.modality for target in prunable})
        raise ValueError(
            f"Nothing to prune: target_modules={config.target_modules!r} and "
            f"exclude_modules={config.exclude_modules!r} leave no Linear or Conv1D of a pruned modality. The model "
            f"has {present}; {sorted(DEFAULT_OFF)} are pruned only when named in modalities or modality_sparsity."
        )
    targets = [replace(target, target=config.modality_target(target.modality)) for target in wanted]
    for target in targets:
        _check_weight(target)
    return targets
