"""A folder that is filled over several runs and appears under its name when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..files import check_new_folder, write_text


__all__ = ["StagedFolder"]

_STATE_NAME = ".conversion.json"


class StagedFolder:
    """The folder `.NAME.partial` beside the folder NAME to make. A run that was killed is taken up where it stopped.

    Args:
        output: the folder to make. Missing parents are made.
        job: JSON that describes what is written; files left by a run with another one are thrown away.

    Raises:
        FileExistsError: a file or a folder that is not empty is at `output`.
    """

    def __init__(self, output: str | os.PathLike[str], job: dict[str, Any]) -> None:
        self.output = Path(output).absolute()
        check_new_folder(self.output)
        self.path = self.output.with_name(f".{self.output.name}.partial")
        description = json.dumps(job, sort_keys=True, indent=1)
        if self._read_state() != description:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_text(self.path / _STATE_NAME, description)

    def _read_state(self) -> str | None:
        state = self.path / _STATE_NAME
        return state.read_text(encoding="utf-8") if state.is_file() else None

    def finish(self, names: set[str]) -> None:
        """Give the folder its name.

        Args:
            names: the files it is to have; what else there is was left by a run that was killed, and goes.
        """
        for entry in self.path.iterdir():
            if entry.name not in names | {_STATE_NAME}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.path / _STATE_NAME).unlink()
        os.replace(self.path, self.output)
