"""Models to measure: named shapes and configuration files with random weights, and pretrained models."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..pretrained import check_model_name, load_whole
from .shapes import SHAPES, Task


__all__ = ["build_model", "find_task", "has_weights", "load_config", "share_weights"]


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of `model`.

    Args:
        model: a name in `SHAPES`, the path of a `config.json`, a folder with one, or a model's name on the Hub.

    Raises:
        OSError: there is no such file, folder or model.
    """
    if model in SHAPES:
        return AutoConfig.for_model(SHAPES[model].model_type, **SHAPES[model].fields)
    check_model_name(model)
    return AutoConfig.from_pretrained(model)


def find_task(model: str, config: PreTrainedConfig) -> Task:
    """How a model is used, as far as its architecture tells.

    Args:
        model: as in `load_config`.
        config: its configuration.

    Raises:
        ValueError: the architecture tells nothing, or is made of several (a vision-language model, say).
    """
    if model in SHAPES:
        return SHAPES[model].task
    if config.is_encoder_decoder:
        return "seq2seq"
    if type(config) in MODEL_MAPPING and not config.sub_configs:
        if MODEL_MAPPING[type(config)].main_input_name == "pixel_values":
            return "vision"
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            return "encoder"
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return "causal"
    raise ValueError(
        f"How {model} (architecture {config.model_type!r}) is used is not known. Name the task: "
        f"{', '.join(get_args(Task))}. Of a model with several towers, pass the config.json of one of them."
    )


def build_model(
    model: str, config: PreTrainedConfig, task: Task, *, dtype: torch.dtype, device: torch.device, random_weights: bool
) -> PreTrainedModel:
    """The model in evaluation mode, without the heads that the task does not use.

    Args:
        model: as in `load_config`.
        config: its configuration.
        task: which of transformers' automatic classes is taken.
        dtype: type of the weights.
        device: where they are put.
        random_weights: draw them (from torch's global generator) even if `model` has pretrained ones; a name in
            `SHAPES` and the path of a `.json` file have none, and are always drawn.

    Raises:
        ValueError: the checkpoint lacks weights of such a model.
    """
    automatic = _automatic_class(task, config)
    if random_weights or _is_configuration(model):
        with device:
            built = automatic.from_config(config, dtype=dtype)
    else:
        built = load_whole(automatic, model, pooler=False, config=config, dtype=dtype).to(device)
    return built.eval()


def has_weights(model: str) -> bool:
    """Whether there are weights to read: not for a name in `SHAPES`, a `config.json`, or a folder with one alone."""
    folder = Path(model)
    if _is_configuration(model):
        return False
    return not folder.is_dir() or any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def _is_configuration(model: str) -> bool:
    return model in SHAPES or Path(model).suffix == ".json"


def _automatic_class(task: Task, config: PreTrainedConfig) -> Any:
    if task == "encoder" and config.is_encoder_decoder:
        return AutoModelForTextEncoding
    return {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}.get(task, AutoModel)


def share_weights(model: nn.Module) -> nn.Module:
    """A second model with modules of its own and the same parameters and buffers, so that it takes no memory.

    What is put into one (a plugin, say) leaves the other untouched, and both can be timed in turn.
    """
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
