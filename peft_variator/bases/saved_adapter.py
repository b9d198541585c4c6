"""A SparseLoRA adapter on disk, opened and checked, but not loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..tuners.sparse_lora import SparseLoraConfig
from .checkpoint import Checkpoint, CheckpointError, StoredTensor


__all__ = ["KEY_PREFIX", "SavedAdapter"]

KEY_PREFIX = "base_model.model."
"""What PEFT puts before every name in an adapter's file."""

_CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_METHOD = "SPARSE_LOW_RANK"


@dataclass(frozen=True)
class SavedAdapter:
    """A folder with adapter_config.json and adapter_model.safetensors.

    Args:
        path: the folder.
        config: its config.
        tensors: name in the file, without the prefix that PEFT puts before all of them -> tensor.
    """

    path: Path
    config: SparseLoraConfig
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SavedAdapter:
        """Read an adapter's config and the header of its tensors.

        Raises:
            CheckpointError: a file is missing or damaged, or the adapter is none of SparseLoRA.
        """
        folder = Path(path)
        _check_method(folder)
        if not (folder / _WEIGHTS_NAME).is_file():
            raise CheckpointError(
                f"{folder} has no {_WEIGHTS_NAME}. Save the adapter with save_pretrained, which writes it."
            )
        stored = Checkpoint.from_files([folder / _WEIGHTS_NAME]).tensors
        tensors = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in stored.items()}
        return cls(folder, SparseLoraConfig.from_pretrained(str(folder)), tensors)

    @property
    def weights(self) -> Path:
        """The file with its tensors."""
        return self.path / _WEIGHTS_NAME

    @property
    def files(self) -> list[Path]:
        """Both of its files."""
        return [self.path / _CONFIG_NAME, self.weights]

    @property
    def architecture(self) -> str | None:
        """The class of the model that it was trained on, where it is known."""
        return (self.config.auto_mapping or {}).get("base_model_class")


def _check_method(folder: Path) -> None:
    """Raise unless the config is that of a SparseLoRA adapter."""
    path = folder / _CONFIG_NAME
    try:
        method = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} can't be read as the config of an adapter: {error!r}") from error
    if method == "VARIATOR":
        raise CheckpointError(
            f"{path}: peft_type='VARIATOR'. A compression plugin merges hidden vectors and no weights, so there is "
            "nothing to put into the base. Load it above the base with PeftModel.from_pretrained."
        )
    if method != _METHOD:
        raise CheckpointError(
            f"{path}: peft_type={method!r}, but only SparseLoRA adapters ({_METHOD!r}) are merged on files: another "
            "update fills the zeros of the base. Train with SparseLoraConfig; or, where a dense model is what you "
            "want, load a dense base and call PEFT's merge_and_unload()."
        )
