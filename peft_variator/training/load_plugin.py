"""Loading a plugin onto another head of the model that it was trained on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import nn

from ..adapter_state import read_keys, undone_on_error
from ..model_files import check_reachable
from ..models import KEY_PREFIX
from ..offloading import refuse_disk_offload


__all__ = ["load_plugin"]

T = TypeVar("T")


def load_plugin(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = True
) -> PeftModel:
    """Put a saved adapter on a model that may have another head than the one it was trained with, and make it active.

    A plugin trained on `BertModel` names its tensors `encoder.layer.0…`, one for `BertForSequenceClassification` names
    them `bert.encoder.layer.0…`. The part of the names that differs is found by looking for the plugin's modules in
    the model, and replaced in the configuration, too, where that names modules (`ratio_schedule` and the like);
    everything else is `PeftModel.from_pretrained` and `PeftModel.load_adapter`.

    Args:
        model: the base model, or a `PeftModel` that gets one more adapter of its kind. A task LoRA that
            `model.load_adapter` has put on the base stays where it is.
        path: folder of the adapter, or its name on the Hub.
        adapter_name: name that it gets.
        is_trainable: whether it is to be trained further, as in the second stage of a plugin.

    Raises:
        OSError: it is no folder and not in the Hub's cache, and the Hub can't be reached.
        TypeError: `path` is no path, as where the two are swapped.
        ValueError: the adapter's file can't be read; the model is a `PeftModel` of another method, has no modules, or
            modules of more than one part, that the adapter fits; not every tensor of the adapter was loaded; or the
            model is offloaded to disk, where PEFT would overwrite its files. The model is left as it was.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"load_plugin got a model of type {type(model).__name__} and a path of type {type(path).__name__}. Give "
            "the model first and the adapter's folder or name second: load_plugin(model, 'my-plugin')."
        )
    refuse_disk_offload(model)
    path = os.fspath(path)
    check_reachable(path, CONFIG_NAME)
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, WEIGHTS_NAME)):
        read_keys(Path(path, SAFETENSORS_WEIGHTS_NAME))
    config, prefix = _config_of(path)
    method = config.peft_type
    if isinstance(model, PeftModel) and model.peft_type != method:
        raise ValueError(
            f"The adapter in {path} has the method {PeftType(method).value}, and the model is a PeftModel of "
            f"{PeftType(model.peft_type).value}, which takes adapters of that method alone. Put it on the base, with "
            f"the adapter that is there: load_plugin(model.get_base_model(), {path!r}, NAME), under a name of its "
            "own; or have base.load_adapter(FOLDER, adapter_name=NAME) load that one first."
        )
    weights = load_peft_weights(path, device="cpu")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    mapping = _find_renaming(weights, prefix, {name for name, _ in base.named_modules() if name}, path)
    _rename_modules(config, mapping)
    config.inference_mode = not is_trainable
    with undone_on_error(model):
        if isinstance(model, PeftModel):
            if adapter_name not in model.peft_config:
                model.add_adapter(adapter_name, config)
            model.load_adapter(path, adapter_name, is_trainable=is_trainable, key_mapping=mapping)
            model.set_adapter(adapter_name, inference_mode=not is_trainable)
        else:
            model = PeftModel.from_pretrained(
                model, path, adapter_name, is_trainable=is_trainable, config=config, key_mapping=mapping
            )
        _check_loaded(model, adapter_name, {_renamed(name, mapping) for name in weights}, path)
    return model


def _config_of(path: str) -> tuple[PeftConfig, str]:
    """An adapter's configuration, and what the names of its tensors start with by its method."""
    try:
        config = PeftConfig.from_pretrained(path)
        return config, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"The adapter in {path}: peft_type in {CONFIG_NAME} is none of PEFT's methods, or one without tensors of "
            f"its own ({error}). Save the adapter again with save_pretrained."
        ) from error


def _adapted_modules(names: Iterable[str], prefix: str) -> set[str]:
    """Names of the modules that have an adapter, as they were in the model it was saved from.

    What a plugin adds inside of a network that it wraps (low-rank updates of its maps) belongs to the wrapped module.
    """
    pattern = re.compile(rf"{re.escape(KEY_PREFIX)}(.+?)(?:\.base_layer(?:\..+)?)?\.{re.escape(prefix)}")
    return {found[1] for name in names if (found := pattern.match(name))}


def _find_renaming(keys: Iterable[str], prefix: str, modules: set[str], path: str) -> dict[str, str]:
    """What to replace at the start of the adapted modules' names, as PEFT's `key_mapping`; empty if nothing."""
    adapted = _adapted_modules(keys, prefix)
    if adapted and adapted <= modules:
        return {}
    beginnings = {_beginnings(name, module) for name in sorted(adapted)[:1] for module in modules}
    fitting = [
        (old, new)
        for old, new in sorted(beginnings)
        if not _has_index(old + new) and {_moved(name, old, new) for name in adapted} <= modules
    ]
    if len(fitting) != 1:
        places = "in several places: " + ", ".join(repr(new) for _, new in fitting) if fitting else "nowhere"
        unknown = min(adapted - modules, default="(none)")
        key = next((key for key in keys if unknown in _adapted_modules([key], prefix)), "no tensor at all")
        raise ValueError(
            f"The adapter in {path} belongs to modules such as {unknown!r} ({key}), which fit this model {places}. "
            "Load it onto the model, or the part of a model, that it was trained with."
        )
    old, new = fitting[0]
    # Only the adapted modules are moved: a head that was saved with the adapter keeps its name.
    following = sorted({re.escape(name.removeprefix(old).split(".")[0]) for name in adapted})
    return {rf"^{re.escape(old)}(?=(?:{'|'.join(following)})\.)": new}


def _beginnings(name: str, module: str) -> tuple[str, str]:
    """What is left of both names without the path that they both end in."""
    own, other = name.split("."), module.split(".")
    while own and other and own[-1] == other[-1]:
        own.pop()
        other.pop()
    return "".join(f"{part}." for part in own), "".join(f"{part}." for part in other)


def _has_index(beginning: str) -> bool:
    """Whether a layer's number is part of it: layers are not moved."""
    return any(part.isdecimal() for part in beginning.split("."))


def _moved(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else ""


def _renamed(key: str, mapping: dict[str, str]) -> str:
    return KEY_PREFIX + _renamed_module(key.removeprefix(KEY_PREFIX), mapping)


def _renamed_module(name: str, mapping: dict[str, str]) -> str:
    for pattern, replacement in mapping.items():
        name = re.sub(pattern, replacement, name)
    return name


def _rename_modules(config: PeftConfig, mapping: dict[str, str]) -> None:
    """Give the modules that a configuration names in full the names that they have in the model."""

    def moved(names: Mapping[str, T]) -> dict[str, T]:
        return {_renamed_module(name, mapping): value for name, value in names.items()}

    for field, value in list(vars(config).items()):
        if field.endswith("_pattern") and isinstance(value, dict):
            setattr(config, field, moved(value))
        elif field == "ratio_schedule" and value is not None:
            setattr(config, field, {k: moved(row) for k, row in value.items()})
        elif field in ("target_modules", "exclude_modules") and isinstance(value, list | set):
            setattr(config, field, type(value)(_renamed_module(name, mapping) for name in value))


def _check_loaded(model: PeftModel, adapter_name: str, saved: set[str], path: str) -> None:
    # PEFT's "auto" asks the Hub for the base, to find out whether its embeddings were saved, too: the file tells.
    loaded = set(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    if saved - loaded:
        loaded = set(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True))
    if loaded != saved:
        raise ValueError(
            f"The adapter in {path} does not fit the model: it lacks {sorted(loaded - saved)[:3]} and has "
            f"{sorted(saved - loaded)[:3]} that the model does not take ({len(loaded ^ saved)} in all). Load it onto "
            "the architecture it was trained with."
        )
