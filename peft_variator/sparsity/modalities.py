"""Which part of a model a module belongs to: vision tower, language model, Q-Former, projector or head.

Read from the model's own structure: every `PreTrainedModel` inside a model declares what it takes
(`input_modalities`), and a tower is such a model with one kind of input. No name of an architecture appears here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel


__all__ = ["DEFAULT_OFF", "WHOLE_MODEL", "Modalities", "block_stacks", "innermost", "is_inside"]

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
