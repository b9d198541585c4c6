"""A model folder on disk, opened and checked, but not loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..models import model_class
from .checkpoint import Checkpoint, CheckpointError
from .config import METHOD, Sparse24Config
from .load import translate_compressed_tensors


__all__ = ["ModelFolder"]


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json and safetensors files.

    Args:
        path: the folder.
        config: config.json without what it says about quantization.
        published: what it says about sparsity; None for a plain dense model.
        checkpoint: the tensors.
        ours: whether this package packed it.
    """

    path: Path
    config: dict[str, Any]
    published: Sparse24Config | None
    checkpoint: Checkpoint
    ours: bool

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ModelFolder:
        """Read a folder's config.json and headers, and check the checksums where there are any.

        Raises:
            CheckpointError: a file is missing or damaged.
            ValueError: the model is quantized in a way that can't be read.
        """
        folder = Path(path)
        config = _read_config(folder)
        # config.json had the entry `compression_config` before transformers knew the format
        entries = [config.pop(name, None) for name in ("quantization_config", "compression_config")]
        entry = next((entry for entry in entries if entry), None)
        ours = entry is not None and entry.get("quant_method") == METHOD
        published = None
        if entry is not None:
            published = Sparse24Config.from_entry(entry) if ours else translate_compressed_tensors(entry)
        checkpoint = Checkpoint.from_directory(folder)
        if published is not None and published.checksums:
            checkpoint.check_checksums()
        return cls(folder, config, published, checkpoint, ours)

    def dtype(self) -> torch.dtype:
        """The dtype of config.json, which 8-bit weights are decompressed to."""
        return AutoConfig.from_pretrained(self.path).dtype or torch.float32

    @property
    def has_class(self) -> bool:
        """Whether config.json names a class of transformers."""
        return model_class(AutoConfig.from_pretrained(self.path)) is not None

    def skeleton(self, architecture: str | None = None) -> PreTrainedModel:
        """The model that config.json describes, dense and without weights.

        Args:
            architecture: the class to make instead of the one that was saved, if transformers has it for this config.

        Raises:
            CheckpointError: its architecture is no class of transformers.
        """
        config = AutoConfig.from_pretrained(self.path)
        vars(config).pop("quantization_config", None)
        cls = model_class(config)
        if architecture is not None:
            config.architectures = [architecture]
            other = model_class(config)
            cls = other if other is not None and other.config_class is type(config) else cls
        if cls is None:
            raise CheckpointError(
                f"{self.path / 'config.json'}: architectures={config.architectures} names no class of transformers, "
                "so its linear layers are unknown. Load the model with its own code and Sparse24Config, and save it."
            )
        with torch.device("meta"):
            return cls(config)

    def packed_config(self, left_dense: list[str]) -> dict[str, Any]:
        """config.json of the packed model, whose layers are all packed but those named."""
        new = dict(self.config)
        if not new.get("dtype") and not new.get("torch_dtype"):
            # otherwise transformers takes it from the first floating tensor of the files, before they are checked
            new["dtype"] = str(self.checkpoint.dtype).removeprefix("torch.")
        entry = Sparse24Config(targets=["Linear"], ignore=left_dense, checksums=True).to_dict()
        return {**new, "quantization_config": entry}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not the fields of a config.")
    return config
