"""What kind of model is this: named shapes, configurations, tasks, and models as transformers saved them."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
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


__all__ = [
    "SHAPES",
    "Shape",
    "Task",
    "build_model",
    "check_model_name",
    "find_task",
    "has_weights",
    "load_config",
    "load_whole",
    "model_class",
    "share_weights",
]

Task = Literal["encoder", "causal", "seq2seq", "vision"]

_POOLER = re.compile(r"(^|\.)pooler\.")


@dataclass(frozen=True)
class Shape:
    """Dimensions of a published model.

    Args:
        model_type: transformers' name of the architecture.
        task: how the model is used.
        fields: what differs from the defaults of the architecture's configuration, which are those of the first
            published model (BERT-base for `bert`, ViT-B/16 for `vit`).
    """

    model_type: str
    task: Task
    fields: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    "bert-base": Shape("bert", "encoder"),
    "minilm-l6": Shape(
        "bert",
        "encoder",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "t5-base-encoder": Shape(
        "t5", "encoder", {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    ),
    "vit-base": Shape("vit", "vision"),
    "qwen2.5-0.5b": Shape(
        "qwen2",
        "causal",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        "causal",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
    "llama-3.2-1b": Shape(
        "llama",
        "causal",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
}


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of `model`.

    Args:
        model: a name in `SHAPES`, the path of a `config.json`, a folder with one, or a model's name on the Hub.

    Raises:
        OSError: there is no such file, folder or model; the message names shapes that are spelt alike.
    """
    if model in SHAPES:
        return AutoConfig.for_model(SHAPES[model].model_type, **SHAPES[model].fields)
    try:
        check_model_name(model)
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        close = [name for name in SHAPES if name.startswith(model.lower())] or get_close_matches(model.lower(), SHAPES)
        if not close:
            raise
        raise OSError(f"{error} Did you mean {' or '.join(map(repr, close))}?") from error


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


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that wrote a checkpoint, by its config's `architectures`; None if there is none."""
    for name in config.architectures or ():
        found = getattr(transformers, name) if name in dir(transformers) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel):  # transformers has other classes, too
            return found
    return None


def check_model_name(name: str) -> None:
    """Raise if `name` can only be a path, and nothing is there; transformers would take it for a name on the Hub.

    Raises:
        FileNotFoundError: nothing is at this path.
    """
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/")
    if is_path and not Path(name).exists():
        raise FileNotFoundError(f"There is no folder {name!r}. Name a folder with a model, or a model on the Hub.")


def load_whole(automatic: Any, name: str, *, pooler: bool = True, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained` that draws no weights at random.

    Args:
        automatic: a model class of transformers, or an automatic one.
        name: folder, or name on the Hub.
        pooler: whether a pooler counts; checkpoints with another head lack it, and hidden states don't need it.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks weights.
    """
    loaded, info = automatic.from_pretrained(name, output_loading_info=True, **kwargs)
    missing = sorted(key for key in info["missing_keys"] if pooler or not _POOLER.search(key))
    if missing:
        first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ValueError(
            f"{name!r} does not hold all weights of a {type(loaded).__name__}: {first} are missing and would be "
            "random. It may have been saved with another head, or in another format: convert it first."
        )
    return loaded
