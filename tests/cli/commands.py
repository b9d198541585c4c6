"""Running a command of ours in this process."""

from __future__ import annotations

import re
from typing import Any

from typer.testing import CliRunner

from peft_variator.cli.main import app


def run_command(*words: Any) -> tuple[int, str, str]:
    """Exit status, output and errors of `peft-variator WORDS`; tables and messages come out as one line of words."""
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, re.sub(r"\s+", " ", done.stdout), re.sub(r"\s+", " ", done.stderr)
