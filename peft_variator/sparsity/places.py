"""Where the tensors of a checkpoint on disk belong: their modules, blocks and modalities."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..models import model_class
from .modalities import WHOLE_MODEL
from .targets import find_prunable


__all__ = ["Place", "place_by_config", "place_by_name"]


class Place(NamedTuple):
    """What a weight belongs to; `transposed`: it lies as (in_features, out_features)."""

    name: str
    block: str
    modality: str
    transposed: bool


def place_by_config(path: Path) -> Callable[[str], Place | None] | None:
    """Where a tensor belongs, from the model that config.json describes, built without weights; None without one."""
    if not (path / "config.json").is_file() or "auto_map" in json.loads((path / "config.json").read_text("utf-8")):
        return None
    config = AutoConfig.from_pretrained(path)
    cls = model_class(config)
    if cls is None:
        return None
    with torch.device("meta"):
        model = cls(config)
    places = {target.name: target for target in find_prunable(model)}
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]

    def place(tensor: str) -> Place | None:
        name, _ = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        target = places.get(name.removesuffix(".weight"))
        return None if target is None else Place(target.name, target.block, target.modality, target.transposed)

    return place


def place_by_name(tensor: str) -> Place | None:
    """Where a tensor belongs, from its name alone: every ".weight" counts as a linear layer's."""
    if not tensor.endswith("weight"):
        return None
    name = tensor.removesuffix("weight").removesuffix(".")
    block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return Place(name, block[0] if block else name, WHOLE_MODEL, False)
