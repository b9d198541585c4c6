"""Checkpoints of a run that trains an adapter: only the same run goes on from them."""

from __future__ import annotations

import json
from dataclasses import asdict

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ..files import check_new_file, write_text
from .run_settings import RunSettings


__all__ = ["check_checkpoints", "go_on"]

SETTINGS_NAME = "run.json"


def check_checkpoints(settings: RunSettings) -> None:
    """Raise unless the folder for checkpoints is free, or holds those of this very run.

    Raises:
        OSError: the folder can't be written to.
        ValueError: the checkpoints are of another run; the message says what differs.
    """
    if settings.checkpoints is None:
        return
    file = settings.checkpoints / SETTINGS_NAME
    check_new_file(file)
    if _last_checkpoint(settings) is None:
        return
    if not file.is_file():
        raise ValueError(f"{settings.checkpoints} holds checkpoints of an unknown run. Name another folder.")
    before, now = json.loads(file.read_text(encoding="utf-8")), _facts(settings)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{settings.checkpoints} holds checkpoints of a run with {name}={before.get(name)!r}, and this one "
                f"has {now.get(name)!r}. Go on with the old value, or name another folder for checkpoints."
            )


def go_on(trainer: Trainer, settings: RunSettings) -> None:
    """Train, from the last checkpoint of the run if there is one; say in their folder which run they are of."""
    last = _last_checkpoint(settings)
    if settings.checkpoints is not None and trainer.is_world_process_zero():
        write_text(settings.checkpoints / SETTINGS_NAME, json.dumps(_facts(settings), indent=2) + "\n")
    trainer.train(resume_from_checkpoint=last)


def _last_checkpoint(settings: RunSettings) -> str | None:
    folder = settings.checkpoints
    return get_last_checkpoint(str(folder)) if folder is not None and folder.is_dir() else None


def _facts(settings: RunSettings) -> dict[str, object]:
    """All settings that decide what is trained, as JSON gives them back."""
    facts = {"subcommand": settings.subcommand, **asdict(settings)}
    return {name: value for name, value in facts.items() if name not in ("output", "checkpoints")}
