"""`--license` and `--push-to-hub` of the commands that write a model or an adapter."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..adapter_card import set_license
from ..hub import check_push, push_folder
from ..model_files import ADAPTER_CONFIG_NAME, read_fields
from .console import Reporter


__all__ = ["Publishing"]


@dataclass(frozen=True)
class Publishing:
    """Where what a command writes is published.

    Args:
        repo: repository on the Hub to push it to; `None`: it stays here.
        license: identifier of its license; `None`: none is named, or that of the model it is made of.

    Raises:
        ValueError: the license is no identifier.
    """

    repo: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"--license is {self.license!r}; give an identifier as the Hub has them, such as apache-2.0, mit or "
                "cc-by-4.0; other for any that has none."
            )

    def check(self) -> str | None:
        """The whole name of the repository; raises unless it can be published: before the work, not after it."""
        return None if self.repo is None else check_push(self.repo)

    def set_license(self, folder: Path) -> None:
        """Name the license in the card of a folder."""
        if self.license is not None:
            set_license(folder, self.license)

    def push(self, folder: Path, reporter: Reporter) -> None:
        """Push a folder, if it is to be, and tell where it is.

        Raises:
            OSError: it was not pushed. The folder is whole; how to push it is said.
        """
        if self.repo is None:
            return
        try:
            url = push_folder(folder, self.repo, f"Upload {folder.name} with peft-variator")
        except OSError as error:
            again = shlex.join(["hf", "upload", self.repo, str(folder)])
            raise OSError(f"{error} To push it later: {again}") from error
        reporter.say(f"Pushed to {url}.")
        config = folder / ADAPTER_CONFIG_NAME
        base = read_fields(config).get("base_model_name_or_path") if config.is_file() else None
        if isinstance(base, str) and Path(base).exists():
            reporter.warn(
                f"The adapter names a folder of this machine as its base, {base!r}: others can't load it by that. "
                f"Push the base, too, and put its name on the Hub into {ADAPTER_CONFIG_NAME}."
            )
        if self.license is None:
            reporter.warn("No license is named, so nobody may use it. Name one in README.md, or with --license.")
