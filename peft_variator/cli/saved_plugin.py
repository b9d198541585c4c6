"""A saved plugin as a command gets it: its folder, its base, and the class of model that it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftType
from peft.utils import load_peft_weights
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from ..adapter_card import AUTO_CLASSES
from ..field_types import name_some
from ..model_files import ADAPTER_CONFIG_NAME, check_reachable
from ..models import KEY_PREFIX, find_task, is_pooler, load_config, without_loading_report
from ..tuners.variator import VariatorConfig


__all__ = ["SavedPlugin", "open_plugin"]


@dataclass(frozen=True)
class SavedPlugin:
    """A Variator plugin in a folder or on the Hub.

    Args:
        name: the folder, or the name on the Hub.
        base: folder or Hub name of its base.
        config: its configuration.
    """

    name: str
    base: str
    config: VariatorConfig

    @property
    def ratios(self) -> list[int]:
        """The ratios it was trained for; where that is not recorded, its own."""
        return [ratio for ratio in self.config.trained_ratios or () if ratio > 1] or [self.config.compression_ratio]

    def check_base(self, option: str) -> None:
        """Raise unless the base can be had.

        Args:
            option: how the command is told of another place of it, as the end of a sentence.

        Raises:
            OSError: there is no such base.
        """
        try:
            check_reachable(self.base)
        except OSError as error:
            raise OSError(f"{error}. A folder that holds this base can be named {option}") from error

    def load_base(self, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, bool]:
        """The base in the class that the plugin was saved from, and whether its pooler has no weights.

        Raises:
            OSError: there is no such base.
            ValueError: neither the base nor the plugin holds all weights.
        """
        self.check_base("with --base.")
        with without_loading_report():
            loaded, info = self._class().from_pretrained(self.base, output_loading_info=True, dtype=dtype)
        in_adapter = {key.removeprefix(KEY_PREFIX) for key in load_peft_weights(self.name, device="cpu")}
        missing = {key for key in info["missing_keys"] if key not in in_adapter}
        pooler = set(filter(is_pooler, missing))
        if missing - pooler:
            raise ValueError(
                f"Neither {self.base!r} nor {self.name!r} holds {name_some(missing - pooler)} of a "
                f"{type(loaded).__name__}, which would be random. Name the base of the plugin with --base."
            )
        return loaded.eval(), bool(pooler)

    def _class(self) -> Any:
        """The class of the model that the plugin was saved from, else transformers' choice for the architecture."""
        if self.config.task_type in AUTO_CLASSES:
            return getattr(transformers, AUTO_CLASSES[self.config.task_type])
        name = (self.config.auto_mapping or {}).get("base_model_class")
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if found is not None:
            return found
        config = load_config(self.base)
        if (
            type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
            and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        ):
            return AutoModelForSpeechSeq2Seq
        try:
            task = find_task(self.base, config)
        except ValueError:  # the architecture does not tell, and there is none to ask
            return AutoModel
        return {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}.get(task, AutoModel)


def open_plugin(name: str, base: str | None = None) -> SavedPlugin:
    """Read what a plugin says of itself.

    Args:
        name: folder or Hub name of the plugin.
        base: folder or Hub name of the base; `None`: the one that the plugin names.

    Raises:
        OSError: there is no such folder or repository.
        ValueError: it is no Variator plugin, or nothing names its base.
    """
    check_reachable(name, ADAPTER_CONFIG_NAME)
    if Path(name).is_file():
        raise NotADirectoryError(f"{name!r} is a file. Name the folder that a plugin was saved to.")
    if Path(name).is_dir() and not Path(name, ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{name!r} has no {ADAPTER_CONFIG_NAME}. Name the folder that a plugin was saved to.")
    try:
        config = PeftConfig.from_pretrained(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name!r}: its adapter_config.json is no JSON: {error}.") from error
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise FileNotFoundError(  # the Hub has answered that it has none
            f"{name!r} is no folder here, and no repository on the Hub with an {ADAPTER_CONFIG_NAME} that you may "
            "see. Name a plugin; a private repository needs `hf auth login` or HF_TOKEN."
        ) from error
    if not isinstance(config, VariatorConfig):
        method = PeftType(config.peft_type).value
        raise ValueError(f"{name!r} has the method {method}, not a Variator plugin. Name a plugin.")
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{name!r} does not name its base. Name the base as well.")
    return SavedPlugin(name, base, config)
