"""Names: which parameter of a model a checkpoint's key becomes, and which layers a config means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key


__all__ = ["KeyNames", "matches"]


class KeyNames:
    """How `from_pretrained` renames the keys of checkpoints for one model.

    Args:
        model: the model, possibly on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._targets = {
            pattern: entry.target_patterns for entry in self._converters for pattern in entry.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def renamed(self, key: str) -> str:
        """`key` before the prefix of the base model is added or removed."""
        return apply_renamings(key, self._renamings)

    def parameter(self, key: str) -> str | None:
        """The name in the model of the parameter that `key` is; None where there is none, or it is a part of one."""
        name, pattern = self._rename(key)
        return name if pattern is None and name in self._state else None

    def targets(self, key: str) -> list[str]:
        """The names in the model of all that is made of `key`; empty where the model has no use for it."""
        name, pattern = self._rename(key)
        first, *others = self._targets.get(pattern, [name]) if pattern else [name]
        return [
            target for target in (name, *(name.replace(first, other) for other in others)) if target in self._state
        ]

    def _rename(self, key: str) -> tuple[str, str | None]:
        renamed = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if renamed[0] not in self._state and key in self._state:
            # as transformers does: a key that is already right is not renamed
            renamed = rename_source_key(key, [], [], self._prefix, self._state)
        return renamed


def matches(module: nn.Module, name: str, patterns: Iterable[str]) -> bool:
    """Whether `patterns` mean a layer: by its name, its class, or a regular expression `re:...` for its name.

    Args:
        module: the layer.
        name: its name in the checkpoint.
        patterns: as in the `targets` and `ignore` of compressed-tensors; an expression has to match from the start.
    """
    return any(
        re.match(pattern[3:], name) is not None
        if pattern.startswith("re:")
        else pattern in (name, type(module).__name__)
        for pattern in patterns
    )
