"""What kind of model is this: named shapes, tasks and heads, and how it is built and loaded."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from .field_types import name_some, shown
from .model_files import CONFIG_NAME, CheckpointError, read_model_config


__all__ = [
    "KEY_PREFIX",
    "SHAPES",
    "Head",
    "Shape",
    "Task",
    "blaming_config",
    "build_empty",
    "build_model",
    "find_task",
    "has_ctc_head",
    "has_decoder",
    "has_weights",
    "head_of",
    "is_in_table",
    "is_pooler",
    "load_config",
    "load_whole",
    "main_input",
    "model_class",
    "on_device",
    "share_weights",
    "shifts_labels",
    "takes_sound",
    "takes_videos",
    "without_loading_report",
]

Model = TypeVar("Model", bound=nn.Module)

KEY_PREFIX = "base_model.model."
"""What PEFT puts before every name in an adapter's file."""

Task = Literal["encoder", "causal", "seq2seq", "vision"]
Head = Literal["seq2seq", "causal", "masked", "token-classification", "classification", "question-answering"]

# transformers' own tables of model classes. A class of several tables (BERT with a causal head) is read by the first.
_HEADS: tuple[tuple[Mapping[str, Any], Head], ...] = (
    (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "seq2seq"),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal"),
    (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "causal"),
    (modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "causal"),  # but for encoder–decoders: see head_of
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked"),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "token-classification"),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "classification"),
    (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "classification"),
    (modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, "classification"),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "question-answering"),
)

# Language models that take the label at position t for what position t predicts, unshifted.
_UNSHIFTED = frozenset(
    {
        "BartForCausalLM",
        "BigBirdPegasusForCausalLM",
        "BlenderbotForCausalLM",
        "BlenderbotSmallForCausalLM",
        "FlaubertWithLMHeadModel",
        "MBartForCausalLM",
        "MarianForCausalLM",
        "MvpForCausalLM",
        "PLBartForCausalLM",
        "PegasusForCausalLM",
        "ProphetNetForCausalLM",
        "TrOCRForCausalLM",
        "WhisperForCausalLM",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
    }
)

# What a model takes as a tensor alone, where other arguments may be lists of numbers.
_ALWAYS_TENSORS = frozenset(
    {
        "attention_mask",
        "decoder_attention_mask",
        "decoder_input_ids",
        "input_features",
        "input_ids",
        "input_values",
        "inputs_embeds",
        "labels",
        "pixel_values",
        "position_ids",
        "token_type_ids",
    }
)
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
        CheckpointError: it is no configuration of a model that transformers knows.
        OSError: there is no such file, folder or model; the message names shapes that are spelt alike, or all of them.
    """
    if model in SHAPES:
        return AutoConfig.for_model(SHAPES[model].model_type, **SHAPES[model].fields)
    try:
        return read_model_config(model)
    except OSError as error:
        close = [name for name in SHAPES if name.startswith(model.lower())] or get_close_matches(
            model.lower(), SHAPES, cutoff=0.5
        )
        if close:
            raise OSError(f"Did you mean {' or '.join(map(repr, close))}? {error}") from error
        if "/" in model:  # as no name of a shape
            raise
        raise OSError(f"{model!r} is none of the known shapes ({', '.join(SHAPES)}). {error}") from error


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


def main_input(config: PreTrainedConfig) -> str | None:
    """What the model of a configuration takes first of all: `texts`, `images` or `sound`; `None`: not known."""
    if type(config) not in MODEL_MAPPING:
        return None
    names = {"pixel_values": "images", "input_features": "sound", "input_values": "sound", "input_ids": "texts"}
    return names.get(MODEL_MAPPING[type(config)].main_input_name)


def takes_sound(config: PreTrainedConfig) -> bool:
    """Whether the main input of a configuration's model is sound, as features or as samples."""
    return main_input(config) == "sound"


def takes_videos(config: PreTrainedConfig) -> bool:
    """Whether a configuration's model is one of videos, whose frames come in `pixel_values` as images do."""
    return type(config) in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING


def head_of(model: nn.Module) -> Head | None:
    """What a transformers model predicts, by its class; `None` where its head is not known or there is none.

    Args:
        model: the base model itself, not a wrapper.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    found = next((head for table, head in _HEADS if is_in_table(model, table)), None)
    # A model of images or sound over an encoder–decoder predicts label t at position t, unshifted; and some that
    # transformers counts among those are decoders alone.
    if found in ("causal", "seq2seq"):
        return "seq2seq" if model.config.is_encoder_decoder else "causal"
    return found


def is_in_table(model: nn.Module, table: Mapping[str, Any]) -> bool:
    """Whether a model is of a class that one of transformers' tables of classes has.

    Args:
        model: the base model itself, not a wrapper.
        table: as `MODEL_FOR_CTC_MAPPING_NAMES`.
    """
    return bool({cls.__name__ for cls in type(model).__mro__} & _class_names(table))


def has_ctc_head(model: nn.Module) -> bool:
    """Whether a model of sound predicts a token or none at each frame, without saying which frame is which token's.

    Args:
        model: the base model itself, not a wrapper.
    """
    return is_in_table(model, modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES)


def _class_names(table: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for entry in table.values():
        names.update((entry,) if isinstance(entry, str) else entry)
    return names


def shifts_labels(model: nn.Module) -> bool:
    """Whether a language model's label at position t is what position t - 1 predicts, as in most.

    Args:
        model: the base model itself, not a wrapper.
    """
    return not any(cls.__name__ in _UNSHIFTED for cls in type(model).__mro__)


def has_decoder(model: nn.Module) -> bool:
    """Whether a model is an encoder with a decoder, and returns the hidden states of both.

    Args:
        model: the base model itself, not a wrapper.
    """
    # Not told by `config.is_encoder_decoder`, which is also true of an encoder taken out of such a model.
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


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
    if task == "seq2seq" and takes_sound(config):
        return AutoModelForSpeechSeq2Seq
    if task == "encoder" and config.is_encoder_decoder:
        return AutoModelForTextEncoding
    return {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}.get(task, AutoModel)


def share_weights(model: Model) -> Model:
    """A second model with modules of its own and the same parameters and buffers, so that it takes no memory.

    What is put into one (a plugin, say) leaves the other untouched, and both can be timed in turn.
    """
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside of the block, and each of its modules in its own afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a model's call with their tensors on a device.

    Raises:
        TypeError: the batch is not a mapping, or has arrays of NumPy or lists of numbers in place of tensors.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch of type {type(batch).__name__}. It has to be a dict of what the model's forward takes, as a "
            "tokenizer or a collator returns it."
        )
    for name, value in batch.items():
        first, depth = value, 0
        while isinstance(first, list | tuple) and first:
            first, depth = first[0], depth + 1
        # Lists of numbers may be meant elsewhere, as the sizes of images are.
        is_list = depth > 0 and name in _ALWAYS_TENSORS and isinstance(first, int | float | np.generic)
        if is_list or isinstance(first, np.ndarray):
            kind = "a NumPy array" if depth == 0 else f"a {type(value).__name__} of {type(first).__name__}"
            raise TypeError(
                f"A batch has {kind} as {name!r}, where the model takes a tensor. Have the tokenizer or processor "
                f"return tensors (return_tensors='pt'), or pass torch.as_tensor(batch[{name!r}])."
            )
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that wrote a checkpoint, by its config's `architectures`; None if there is none."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        # transformers has other classes, too, and model classes that are only inherited from
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            if getattr(found, "forward", None) is not nn.Module.forward:
                return found
    return None


def build_empty(cls: Any, config: PreTrainedConfig, source: str | os.PathLike[str]) -> PreTrainedModel:
    """The model that a configuration describes, without weights, on the meta device.

    Args:
        cls: a model class of transformers, or an automatic one.
        config: the configuration.
        source: where it was read from, for messages.

    Raises:
        CheckpointError: such a model can't be built.
    """
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    # what a constructor raises at sizes that are none is up to each model
    except Exception as error:
        where = Path(source, CONFIG_NAME) if Path(source).is_dir() else source
        raise CheckpointError(f"{where}: no {cls.__name__} can be built from it: {shown(error)}") from error


@contextmanager
def blaming_config(cls: Any, config: PreTrainedConfig, source: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever fails inside is a `CheckpointError` that names config.json where no model can be built from that.

    Args:
        cls: as in `build_empty`.
        config: as in `build_empty`.
        source: as in `build_empty`.
    """
    try:
        yield
    except (CheckpointError, OSError, ImportError):
        raise
    except Exception:
        build_empty(cls, config, source)
        raise


def is_pooler(name: str) -> bool:
    """Whether a parameter is one of a pooler: checkpoints that were saved without it lack it, and little needs it."""
    return _POOLER.search(name) is not None


@contextmanager
def without_loading_report() -> Iterator[None]:
    """transformers' table of missing and unexpected weights is not logged, for callers that look at what is missing.

    Weights of another head are expected to be unexpected; what went wrong in a conversion is still told.
    """

    def passes(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return " LOAD REPORT" not in message or "CONVERSION" in message

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def load_whole(automatic: Any, name: str, *, pooler: bool = True, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained` that draws no weights at random.

    Args:
        automatic: a model class of transformers, or an automatic one.
        name: folder, or name on the Hub.
        pooler: whether a pooler counts; checkpoints with another head lack it, and hidden states don't need it.
        kwargs: for `from_pretrained`.

    Raises:
        CheckpointError: config.json describes no model that can be built, or one with weights of other shapes.
        ValueError: the checkpoint lacks weights.
    """
    config = kwargs.pop("config", None) or read_model_config(name)
    with blaming_config(automatic, config, name), without_loading_report():
        loaded, info = automatic.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    if info["mismatched_keys"]:
        key, found, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{name!r}: {key} has shape {tuple(found)}, but a {type(loaded).__name__} of its config.json has "
            f"{tuple(wanted)}. Weights and config.json are of different models."
        )
    missing = sorted(key for key in info["missing_keys"] if pooler or not is_pooler(key))
    if missing:
        raise ValueError(
            f"{name!r} does not hold all weights of a {type(loaded).__name__}: {name_some(missing)} are missing and "
            "would be random. It may have been saved with another head, or in another format: convert it first."
        )
    return loaded
