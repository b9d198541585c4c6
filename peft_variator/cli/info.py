"""`peft-variator info`: what an adapter, a packed base or a folder with adapters is, without loading it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from huggingface_hub.utils import TensorInfo
from transformers import AutoConfig, AutoModel

from ..bases import Sparse24Config
from ..bases.config import pop_quantization, read_quantization
from ..hub import ModelFiles, open_files
from ..model_files import ADAPTER_CONFIG_NAME, CONFIG_NAME
from ..models import model_class
from ..tuners.variator.quantization import count_parameters
from .console import Reporter


__all__ = ["AdapterInfo", "ModelInfo", "info"]

MAX_LISTED = 8
PACKED_PARTS = (".compressed", ".bitmask", ".shape", ".row_offsets")
METHODS = {"VARIATOR": "Variator", "SPARSE_LOW_RANK": "SparseLoRA"}


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is, as far as its files tell.

    Args:
        kind: `"adapter"`.
        method: name of the method.
        base: the base model that it names.
        base_class: transformers' class that it was saved with.
        ratios: the compression ratios k that it is configured with, its own first; `None`: not a plugin.
        trained_ratios: the compression ratios that it was trained for; `None`: it does not tell.
        settings: other fields of its configuration that say what it does.
        parameters: number of its parameters; `None`: it is not in the safetensors format.
        bytes: size of its weights.
        base_parameters: number of parameters of the base; `None`: its configuration can't be read.
        share_of_base: `parameters` as a share of the base's.
        flops: by ratio, the operations of one batch: those of the base, of the plugin, and the share saved, as
            `peft-variator train` counted them; `None`: it is not known.
        quality: by ratio, or by state of the model, what was measured after training; `None`: it is not known.
        data: what it was trained on, where that is known.
    """

    kind: str
    method: str
    base: str | None
    base_class: str | None
    ratios: list[int] | None
    trained_ratios: list[int] | None
    settings: dict[str, Any]
    parameters: int | None
    bytes: int
    base_parameters: int | None
    share_of_base: float | None
    flops: dict[str, dict[str, float]] | None
    quality: dict[str, dict[str, float]] | None
    data: str | None


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, as far as its files tell.

    Args:
        kind: `"packed base"`, or `"model"`.
        method: what it is packed with: `"2:4"` and the like; `None`: it is not packed.
        architecture: transformers' class that wrote it.
        format: layout of the packed weights.
        packed_layers: number of packed weights.
        parameters: number of parameters, zeros that are left out included; `None`: not in the safetensors format.
        bytes: size of the files with the weights.
        share_of_dense: size of the weights as a share of what they would take with their zeros, in the same dtype.
    """

    kind: str
    method: str | None
    architecture: str | None
    format: str | None
    packed_layers: int
    parameters: int | None
    bytes: int
    share_of_dense: float | None


def info(name: str, revision: str | None, subfolder: str | None, reporter: Reporter) -> None:
    """Tell what is in a folder or a repository.

    Raises:
        OSError: there is no such folder or repository, or it can't be reached.
        ValueError: neither an adapter nor a model is there, or a file is damaged.
    """
    reporter.check()
    files = open_files(name, revision, subfolder)
    places = sorted(
        {file.rpartition("/")[0] for file in files.sizes if file.rpartition("/")[2] == ADAPTER_CONFIG_NAME}
    )
    adapters = {place: _describe_adapter(files.within(place) if place else files) for place in places}
    model = _describe_model(files) if CONFIG_NAME in files else None
    if model is None and not adapters:
        raise ValueError(
            f"{name!r} holds neither an adapter ({ADAPTER_CONFIG_NAME}) nor a model ({CONFIG_NAME}) of transformers."
        )
    _write_json(name, files.revision, model, adapters, reporter)
    parts = [] if model is None else [_model_lines(name, model)]
    parts += [_adapter_lines(f"{name}/{place}" if place else name, adapter) for place, adapter in adapters.items()]
    for number, lines in enumerate(parts):
        reporter.say(*[""] * bool(number), *lines)


def _write_json(
    name: str, revision: str | None, model: ModelInfo | None, adapters: Mapping[str, AdapterInfo], reporter: Reporter
) -> None:
    """The figures of the one thing there is; of several those of the model, or of the adapter on top, and the rest."""
    others = dict(adapters)
    first = model or others.pop("", None) or (others.popitem()[1] if len(others) == 1 else None)
    found: dict[str, Any] = {"source": name, "revision": revision} | ({} if first is None else asdict(first))
    if others:
        found["adapters"] = {place or ".": asdict(adapter) for place, adapter in others.items()}
    reporter.write_json(json.dumps(found, indent=2))


# Adapters


def _describe_adapter(files: ModelFiles) -> AdapterInfo:
    config = files.read_json(ADAPTER_CONFIG_NAME) or {}
    kind = str(config.get("peft_type"))
    weights = files.weights("adapter_model*.safetensors")
    parameters = _count_parameters(weights, config.get("correction_bits")) if weights else None
    base = config.get("base_model_name_or_path") or None
    base_parameters = None if base is None else _count_base(str(base), config.get("revision"))
    share = None if parameters is None or not base_parameters else parameters / base_parameters
    facts = _facts_of(files)
    trained, mapping = config.get("trained_ratios"), config.get("auto_mapping")
    return AdapterInfo(
        kind="adapter",
        method=METHODS.get(kind, kind),
        base=base,
        base_class=(mapping.get("base_model_class") if isinstance(mapping, dict) else None) or config.get("task_type"),
        ratios=_ratios(config) if kind == "VARIATOR" else None,
        trained_ratios=trained if isinstance(trained, list) else None,
        settings=_settings(kind, config),
        parameters=parameters,
        bytes=files.bytes_of("adapter_model*"),
        base_parameters=base_parameters,
        share_of_base=share,
        flops=_flops(facts),
        quality=_quality(facts),
        data=facts.get("data"),
    )


def _facts_of(files: ModelFiles) -> dict[str, Any]:
    """What `train` or `restore` wrote about its run; nothing where `training.json` is another program's."""
    try:
        facts = (files.read_json("training.json") or {}).get("facts")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


SETTINGS = {
    "VARIATOR": (
        "layer_spans",
        "scoring",
        "decompression",
        "bottleneck_dim",
        "correction_dim",
        "correction_form",
        "correction_rank",
        "correction_bits",
        "compensation_rank",
        "compensation_bits",
        "output_bias",
        "keep_first_tokens",
        "keep_last_tokens",
        "keep_token_ids",
        "keep_outliers",
        "ratio_pattern",
        "ratio_schedule",
    ),
    "SPARSE_LOW_RANK": ("mask", "r", "lora_alpha", "use_rslora", "rank_pattern", "target_modules"),
}


def _settings(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say what an adapter does, those alone that are set."""
    found = dict(config)
    if kind == "VARIATOR":
        if found.setdefault("decompression", "bottleneck") != "bottleneck":  # as in files that lack the key
            found.pop("bottleneck_dim", None)
    if isinstance(found.get("target_modules"), list):
        found["target_modules"] = sorted(found["target_modules"])
    named = {name: found.get(name) for name in SETTINGS.get(kind, ())}
    return {name: value for name, value in named.items() if value not in (None, {}, []) and value is not False}


def _ratios(config: Mapping[str, Any]) -> list[int]:
    """The rows of a schedule; else the ratio of the configuration, and those of single modules."""
    own = config.get("compression_ratio", 4)
    schedule, pattern = config.get("ratio_schedule"), config.get("ratio_pattern")
    named = [*schedule] if isinstance(schedule, dict) else []
    if not named and isinstance(pattern, dict):
        named = [*pattern.values()]
    return list(dict.fromkeys([own, *sorted({int(each) for each in named if str(each).isdecimal()})]))


def _flops(facts: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    """What `peft-variator train` counted; nothing of it stands in what `restore` wrote."""
    found = {}
    for row in _rows(facts):
        base, plugin = row.get("flops_base"), row.get("flops_plugin")
        if isinstance(base, int) and isinstance(plugin, int) and base > 0:
            found[str(row["ratio"])] = {"base": base, "plugin": plugin, "saved": 1 - plugin / base}
    return found or None


def _quality(facts: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    losses = facts.get("losses")
    states = {str(row["ratio"]): row.get("after") for row in _rows(facts)} or (
        losses if isinstance(losses, dict) else {}
    )
    found = {
        str(state): {str(name): value for name, value in measured.items() if isinstance(value, int | float)}
        for state, measured in states.items()
        if isinstance(measured, dict)
    }
    return found or None


def _rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `train` wrote for each ratio."""
    rows = facts.get("ratios")
    return [row for row in rows if isinstance(row, dict) and "ratio" in row] if isinstance(rows, list) else []


def _is_floating(tensor: TensorInfo) -> bool:
    """Whether a tensor may be a parameter; masks, indices and sizes are integers."""
    return tensor.dtype.startswith(("F", "BF"))


def _count(tensor: TensorInfo) -> int:
    return prod(tensor.shape)


def _count_parameters(weights: Mapping[str, TensorInfo], bits: int | None) -> int:
    sizes = ((name, _count(tensor), _is_floating(tensor)) for name, tensor in weights.items())
    return count_parameters(sizes, bits)


def _count_base(base: str, revision: str | None) -> int | None:
    """Number of parameters of a model by its configuration alone; `None` if that can't be read."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision)
        with torch.device("meta"):
            cls = model_class(config)
            model = AutoModel.from_config(config) if cls is None else cls(config)
    except (ImportError, OSError, ValueError):
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _adapter_lines(name: str, found: AdapterInfo) -> list[str]:
    rows = [("Adapter", name), ("Method", found.method), ("Base", found.base or "not named")]
    if found.base_class:
        rows.append(("Saved with", found.base_class))
    if found.ratios is not None:
        rows.append(("k when loaded", _listed(found.ratios)))
        rows.append(("Trained for", "not known" if found.trained_ratios is None else _listed(found.trained_ratios)))
    rows += [(setting, _shown(value)) for setting, value in found.settings.items()]
    rows.append(("Size", _size(found.parameters, found.bytes)))
    if found.share_of_base is None:
        reason = "the base's configuration can't be read" if found.base else "no base is named"
        rows.append(("Share of base", f"not known: {reason}"))
    else:
        rows.append(("Share of base", f"{found.share_of_base:.2%} of {found.base_parameters:,} parameters"))
    for ratio, counted in (found.flops or {}).items():
        rows.append((f"FLOPs, k = {ratio}", f"{counted['saved']:.1%} saved"))
    for state, measured in (found.quality or {}).items():
        label = f"k = {state}" if found.flops else state.capitalize()
        rows.append((f"Quality, {label}", ", ".join(f"{name} {value:.4f}" for name, value in measured.items())))
    if found.data:
        rows.append(("Trained on", found.data))
    return _aligned(rows)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) if len(value) <= MAX_LISTED else f"{len(value)}, {value[0]} first"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    return "yes" if value is True else str(value)


def _size(parameters: int | None, size: int) -> str:
    shown = f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    return shown if parameters is None else f"{parameters:,} parameters, {shown}"


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(label) for label, _ in rows)
    return [f"{label:<{width}}  {text}" for label, text in rows]


# Models


def _describe_model(files: ModelFiles) -> ModelInfo:
    config = files.read_json(CONFIG_NAME) or {}
    method, packing = _packing(config)
    tensors = files.weights("model*.safetensors")
    values = {name: _packed_count(tensors, name) for name in tensors if name.endswith(".compressed")}
    plain = [tensor for name, tensor in tensors.items() if not name.endswith(PACKED_PARTS)]
    dense = sum(map(_bytes, plain))
    for name, count in values.items():
        dense += count * _bytes(tensors[name]) // max(_count(tensors[name]), 1)
    parameters = [tensor for name, tensor in tensors.items() if _is_parameter(name, tensor)]
    return ModelInfo(
        kind="model" if packing is None else "packed base",
        method=method,
        architecture=next(iter(config.get("architectures") or ()), config.get("model_type")),
        format=None if packing is None else packing.format,
        packed_layers=len(values),
        parameters=sum(values.values()) + sum(map(_count, parameters)) if tensors else None,
        bytes=files.bytes_of("model*.safetensors") or files.bytes_of("pytorch_model*.bin"),
        share_of_dense=sum(map(_bytes, tensors.values())) / dense if dense else None,
    )


def _packing(config: dict[str, Any]) -> tuple[str | None, Sparse24Config | None]:
    """What the weights are stored with, and how if it is a format that this package reads."""
    entry = pop_quantization(dict(config))
    if entry is None:
        return None, None
    try:
        packing = read_quantization(entry)
    except ValueError:
        return str(entry.get("quant_method")), None
    return "2:4" if packing.format == "sparse-24-bitmask" else packing.format, packing


def _packed_count(tensors: Mapping[str, TensorInfo], name: str) -> int:
    """Number of weights of a packed layer, by its values: two of every four, or a bit for each."""
    values = tensors[name]
    if len(values.shape) == 2:
        return 2 * _count(values)
    bitmask = tensors.get(f"{name.rpartition('.')[0]}.bitmask")
    return _count(values) if bitmask is None else 8 * _count(bitmask)


def _is_parameter(name: str, tensor: TensorInfo) -> bool:
    """Whether a tensor is a parameter by itself, not a buffer or a part of one."""
    if name.endswith((*PACKED_PARTS, ".weight_scale", ".weight_zero_point")):
        return False
    return _is_floating(tensor) or name.endswith(".weight")


def _bytes(tensor: TensorInfo) -> int:
    return tensor.data_offsets[1] - tensor.data_offsets[0]


def _model_lines(name: str, found: ModelInfo) -> list[str]:
    rows = [("Packed base" if found.kind == "packed base" else "Model", name)]
    if found.architecture:
        rows.append(("Architecture", found.architecture))
    if found.kind == "packed base":
        rows.append(("Format", f"{found.format}, {found.packed_layers} packed layers"))
    elif found.method:
        rows.append(("Quantised", found.method))
    rows.append(("Size", _size(found.parameters, found.bytes)))
    if found.packed_layers and found.share_of_dense is not None:
        rows.append(("Share of dense", f"{found.share_of_dense:.1%} of the bytes"))
    lines = _aligned(rows)
    if found.kind == "packed base":
        return [*lines, "Import peft_variator before it is loaded: transformers alone fills it with random numbers."]
    return [*lines, f"It is not packed. How many of its weights are zero: peft-variator inspect {shlex.quote(name)}"]
