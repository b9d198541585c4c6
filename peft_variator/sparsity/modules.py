"""Which modules of a model are pruned, to what, which part of the model they belong to, and where their weights are.

Modalities are read from the model's own structure: every `PreTrainedModel` inside a model declares what it takes
(`input_modalities`), and a tower is such a model with one kind of input. No name of an architecture appears here.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..bases import Sparse24Linear
from ..compat import is_quantized_tensor, offload_hook
from ..field_types import name_some
from ..files import replacing
from ..tuners.sparse_lora.base_weight import computed_weight_error, has_forward_of_its_own
from .config import PruningConfig
from .patterns import Pattern, Target, check_width


__all__ = [
    "DEFAULT_OFF",
    "WHOLE_MODEL",
    "Modalities",
    "PrunableModule",
    "apply_matrix",
    "block_stacks",
    "find_prunable",
    "find_targets",
    "innermost",
    "is_inside",
    "is_named",
    "read_matrix",
    "replace_matrix",
]

WHOLE_MODEL = "model"
"""Modality of every module of a model that declares no inputs (plain `nn.Module`s)."""

DEFAULT_OFF = frozenset({"projector", "qformer", "head"})
"""Modalities that are pruned only when named."""

_DECLARED = {
    frozenset({"image"}): "vision",
    frozenset({"image", "video"}): "vision",
    frozenset({"video"}): "vision",
    frozenset({"text"}): "language",
    frozenset({"audio"}): "audio",
}


def is_inside(name: str, prefix: str) -> bool:
    """Whether module `name` is the module `prefix` or lies in it; the empty prefix is the whole model."""
    return prefix == "" or name == prefix or name.startswith(prefix + ".")


def innermost(name: str, containers: Iterable[str]) -> str | None:
    """The longest of `containers` that module `name` lies in."""
    return max((prefix for prefix in containers if is_inside(name, prefix)), key=len, default=None)


def block_stacks(model: nn.Module) -> dict[str, list[str]]:
    """The outermost `nn.ModuleList`s of `model`, name -> names of their blocks, in order."""
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and innermost(name, stacks) is None:
            stacks[name] = [f"{name}.{child}" for child, _ in module.named_children()]
    return stacks


def _declared_inputs(model: PreTrainedModel) -> frozenset[str]:
    declared = model.input_modalities
    return frozenset([declared] if isinstance(declared, str) else declared)


class Modalities:
    """Finds the modality of any module of one model.

    - `vision`, `language`, `audio`: in a sub-model whose only input this is.
    - `qformer`: in a block stack of a sub-model that takes several inputs, beside a vision and a language tower;
      `multimodal` where there are no such towers.
    - `projector`: outside of every block stack of a model with several towers (LLaVA's projector, BLIP-2's language
      projection, Qwen2-VL's patch merger, CLIP's projections).
    - `head`: the output embeddings.
    - `model`: anything in a model that is not from transformers.

    Args:
        model: the model.
        named: modality -> names of modules that belong to it, with everything inside them; goes before what is found.

    Raises:
        ValueError: a name in `named` is no module of the model.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, Sequence[str]] | None = None) -> None:
        modules = dict(model.named_modules())
        self._named = {prefix: modality for modality, prefixes in (named or {}).items() for prefix in prefixes}
        for prefix, modality in self._named.items():
            if prefix not in modules:
                raise ValueError(
                    f"modality_modules names {prefix!r} for {modality!r}, but the model has no module of that name. "
                    f"Its outermost modules are {[name for name, _ in model.named_children()]}."
                )
        self._towers = {
            name: _DECLARED.get(_declared_inputs(module))
            for name, module in modules.items()
            if isinstance(module, PreTrainedModel)
        }
        self._stacks = block_stacks(model)
        heads = [module.get_output_embeddings() for module in modules.values() if isinstance(module, PreTrainedModel)]
        self._heads = {name for name, module in modules.items() if any(module is head for head in heads)}
        self._kinds = {kind for kind in self._towers.values() if kind is not None}

    def of(self, name: str) -> str:
        """The modality of the module called `name`."""
        named = innermost(name, self._named)
        if named is not None:
            return self._named[named]
        tower = innermost(name, self._towers)
        if tower is None:
            return WHOLE_MODEL
        if name in self._heads:
            return "head"
        in_stack = innermost(name, self._stacks) is not None
        if not in_stack and len(self._kinds) > 1:
            return "projector"
        return self._towers[tower] or ("qformer" if {"vision", "language"} <= self._kinds else "multimodal")


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


def is_named(name: str, wanted: list[str] | str) -> bool:
    """Whether module `name` is meant: by its whole name or last parts (a list), or by a regex over the whole name."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith("." + item) for item in wanted)


def find_prunable(model: nn.Module, named: Mapping[str, list[str]] | None = None) -> list[PrunableModule]:
    """Every Linear and Conv1D of `model` that computes a plain product, in the order of its modules.

    Routers of experts with a forward of their own are none: their pruned weights could not be restored.

    Args:
        model: the model.
        named: `PruningConfig.modality_modules`.
    """
    modalities = Modalities(model, named)
    blocks = [block for stack in block_stacks(model).values() for block in stack]
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not _computes_otherwise(module):
            block = innermost(name, blocks)
            found.append(PrunableModule(name, module, block or name, modalities.of(name), block is not None))
    return found


def _computes_otherwise(module: nn.Linear | Conv1D) -> bool:
    """Whether the module's output is not the product with its weight."""
    # The out_proj of nn.MultiheadAttention is no layer: its weight is read and its forward never called.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return True
    # Quantised layers have forwards of their own, too; they are refused by name later.
    return has_forward_of_its_own(module) and not _is_quantised(module.weight)


def _is_quantised(weight: Tensor) -> bool:
    return not weight.is_floating_point() or weight.dtype.itemsize < 2 or is_quantized_tensor(weight)


def _check_matched(model: nn.Module, wanted: list[str] | str, prunable: list[PrunableModule]) -> None:
    """Every entry of target_modules must mean at least one module that has a weight to prune."""
    for item in [wanted] if isinstance(wanted, str) else wanted:
        entry: list[str] | str = item if isinstance(wanted, str) else [item]
        if any(is_named(target.name, entry) for target in prunable):
            continue
        others = [name for name, _ in model.named_modules() if is_named(name, entry)]
        found = f"matches {others[:3]}, which have no weight to prune" if others else "matches no module of the model"
        ends = sorted({target.name.rpartition(".")[2] for target in prunable})
        raise ValueError(
            f"target_modules: {item!r} {found}. Only Linear and Conv1D can be pruned; the names here end in {ends}."
        )


def _warn_of_unmatched(unwanted: list[str] | str, prunable: list[PrunableModule]) -> None:
    """An entry of exclude_modules that leaves nothing out is a wrong name, or one that this model does not have."""
    for item in [unwanted] if isinstance(unwanted, str) else unwanted:
        entry: list[str] | str = item if isinstance(unwanted, str) else [item]
        if not any(is_named(target.name, entry) for target in prunable):
            warnings.warn(
                f"exclude_modules: {item!r} matches no Linear or Conv1D of the model, so nothing is left out for it. "
                "A list has whole names or their last parts; a string is a regular expression for the whole name.",
                stacklevel=4,
            )


def _shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """The modules that have each module's very weight, its own among them, in their order."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    sharing = {name: names for names in owners.values() for name in names}
    offloaded = {name for name in sharing if model.get_submodule(name).get_parameter("weight").is_meta}
    # Offloaded weights are no longer one object; transformers still knows.
    for prefix, module in model.named_modules():
        tied = getattr(module, "all_tied_weights_keys", None) if isinstance(module, PreTrainedModel) else None
        for pair in (tied or {}).items():
            one, other = (f"{prefix}.{key}".removeprefix(".").removesuffix(".weight") for key in pair)
            if {one, other} <= offloaded:
                both = list(dict.fromkeys([*sharing[one], *sharing[other]]))
                sharing |= dict.fromkeys(both, both)
    return sharing


def _check_weight(target: PrunableModule, shared: Mapping[str, list[str]]) -> None:
    if isinstance(target.module, Sparse24Linear):
        raise ValueError(
            f"{target.name!r} is a packed 2:4 layer, whose zeros are fixed. Make the model dense first, with "
            "`peft-variator unpack` or, in memory, with model.dequantize(), and prune that."
        )
    if "weight" not in target.module._parameters:
        raise computed_weight_error(target.name, "zeros in it")
    others = [name for name in shared[target.name] if name != target.name]
    if others:
        raise ValueError(
            f"{target.name!r} shares its weight with {name_some(others)}, which pruning would change too. Save the "
            "model once with weights of their own (tie_word_embeddings=False for output embeddings), or leave it out "
            f"with exclude_modules=[{target.name!r}]."
        )
    weight = target.module.weight
    if weight.numel() == 0:
        raise ValueError(
            f"{target.name!r} has an empty weight {tuple(weight.shape)}. Exclude it with exclude_modules."
        )
    if _is_quantised(weight):
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
    if config.exclude_modules is not None and is_named(target.name, config.exclude_modules):
        return False
    named = config.modality_sparsity or config.modalities
    if target.modality not in named if named is not None else target.modality in DEFAULT_OFF:
        return False
    if config.target_modules is not None:
        return is_named(target.name, config.target_modules)
    return target.in_stack or not has_stacks or (named is not None and target.modality in DEFAULT_OFF)


def find_targets(model: nn.Module, config: PruningConfig) -> list[PrunableModule]:
    """The modules that `config` prunes, each with its target (ECoFLaP's budgets come later).

    Raises:
        ValueError: nothing matches, an entry of `target_modules` has no weight, a pattern does not divide a width, a
            modality is not in the model, the model carries adapters, or a weight is quantised, computed or shared.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model carries PEFT adapters. Merge or unload them, then prune the plain model.")
    prunable = find_prunable(model, config.modality_modules)
    if config.target_modules is not None:
        _check_matched(model, config.target_modules, prunable)
    if config.exclude_modules is not None:
        _warn_of_unmatched(config.exclude_modules, prunable)
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
    shared = _shared_weights(model)
    for target in targets:
        _check_weight(target, shared)
    return targets


def _orient(tensor: Tensor, target: PrunableModule) -> Tensor:
    return tensor.T if target.transposed else tensor


def read_matrix(target: PrunableModule) -> Tensor:
    """The weight as (out_features, in_features), on the device where the layer runs. Not to be written to."""
    with align_module_device(target.module):
        return _orient(target.module.weight.detach(), target)


def apply_matrix(target: PrunableModule, inputs: Tensor, matrix: Tensor, with_bias: bool = True) -> Tensor:
    """The layer's output with `matrix` (out_features, in_features) in place of its weight."""
    with align_module_device(target.module):
        return F.linear(inputs, matrix.to(inputs.device), target.module.bias if with_bias else None)


def replace_matrix(target: PrunableModule, matrix: Tensor) -> None:
    """Store `matrix` (out_features, in_features) as the layer's weight, where the weight is kept.

    Raises:
        ValueError: the weight is read from a checkpoint on disk and there is no folder to put another one.
    """
    weight = _orient(matrix, target)
    if not has_offloaded_params(target.module):
        with torch.no_grad():
            target.module.weight.copy_(weight)
        return
    hook: Any = offload_hook(target.module)
    weights, key = hook.weights_map, "weight"
    while isinstance(weights, PrefixedDataset):
        weights, key = weights.dataset, weights.prefix + key
    if isinstance(weights, OffloadedWeightsLoader) and key not in weights.state_dict:
        _replace_on_disk(target.name, weights, key, weight)
        return
    store = weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights
    store[key] = weight.to(store[key].device, copy=True).contiguous()


def _replace_on_disk(name: str, weights: OffloadedWeightsLoader, key: str, weight: Tensor) -> None:
    """Put the weight in a new file of the offload folder and read it from there; no file that exists is changed."""
    if weights.save_folder is None:
        raise ValueError(
            f"{name!r} is offloaded to disk without a folder to write to. Load the model with offload_folder=..., or "
            "give it more memory."
        )
    path = Path(weights.save_folder) / f"{key}.pruned.safetensors"
    with replacing(path) as temporary:
        save_file({key: weight.cpu().contiguous()}, temporary)
    weights.index[key] = {
        "safetensors_file": str(path),
        "weight_name": key,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
