"""Settings that `peft-variator train` and `peft-variator restore` share."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar

from ..files import check_new_folder
from ..models import Task, check_model_name
from ..profiling import has_weights


__all__ = ["RunSettings"]


@dataclass
class RunSettings:
    """Settings of a run that trains an adapter; each is an option of the command.

    Raises:
        ValueError: a setting is out of range, or the model has no pretrained weights.
        FileExistsError: the output folder exists and is not empty.
    """

    subcommand: ClassVar[str]

    model: str
    data: str
    output: Path
    adapter: str | None = None
    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 1
    lr: float = 2e-3
    max_length: int = 128
    held_out: int = 128
    text_column: str = "text"
    split: str = "train"
    task: Task | None = None
    bf16: bool = False
    checkpoints: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it has to be at least 1.")
        check_model_name(self.model)
        if not has_weights(self.model):
            raise ValueError(
                f"{self.model} is a configuration without trained weights, so there is nothing to follow or to "
                "restore. Name a model on the Hub or a folder with one."
            )
        check_new_folder(self.output)

    @property
    def command(self) -> str:
        """The command line of these settings: what differs from the defaults."""
        words = ["peft-variator", self.subcommand, self.model]
        for option in fields(self)[1:]:
            value, name = getattr(self, option.name), "--" + option.name.replace("_", "-")
            if option.default is not MISSING and value == option.default:
                continue
            if value is True:
                words.append(name)
            else:
                for each in value if isinstance(value, list) else [value]:
                    words += [name, str(each)]
        return shlex.join(words)
