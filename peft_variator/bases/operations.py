"""Conversions that transformers runs while it loads: stored parts of a weight in, packed or dense tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from .decode import decode_dense, decode_packed
from .names import KeyNames
from .plan import PlannedWeight


__all__ = ["DecodeWeight", "make_converter"]


class DecodeWeight(ConversionOps):
    """Turns the parts of one stored weight into those that the model has.

    Args:
        weight: the weight and what becomes of it, `"packed"` or `"dense"`.
        part_of_pattern: the patterns of the converter, each the name of one part.
    """

    supports_many_to_many = True

    def __init__(self, weight: PlannedWeight, part_of_pattern: dict[str, str]) -> None:
        self.weight, self.part_of_pattern = weight, part_of_pattern

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Tensors by pattern -> tensors by full name in the model."""
        parts = {self.part_of_pattern[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        stored, dtype = self.weight.stored, self.weight.dtype
        if self.weight.action == "dense":
            return {full_layer_name: decode_dense(stored.layout, parts, dtype, stored.prefix)}
        packed = decode_packed(stored.layout, parts, dtype, stored.prefix)
        module = full_layer_name.rpartition(".")[0]
        return {f"{module}.{part}": tensor for part, tensor in packed._asdict().items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """What is saved is what the model has."""
        return _KeepNames()


class _KeepNames(ConversionOps):
    """Leaves every tensor as it is, under the name it has in the model."""

    supports_many_to_many = True

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Tensors by pattern, which is their name, anchored or not, -> tensors by name."""
        return {pattern.removeprefix("^"): tensors[0] for pattern, tensors in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


def make_converter(weight: PlannedWeight, names: KeyNames) -> WeightConverter:
    """The converter for one weight, for the names that its parts, and no other tensors, have after renaming."""
    patterns = {"^" + names.renamed(part.name).replace(".", r"\."): kind for kind, part in weight.stored.parts.items()}
    dense = names.renamed(weight.stored.name)
    targets = [dense]
    if weight.action == "packed":
        targets = [f"{dense.rpartition('.')[0]}.{part}" for part in ("compressed", "bitmask", "shape")]
    return WeightConverter(list(patterns), targets, [DecodeWeight(weight, patterns)])
