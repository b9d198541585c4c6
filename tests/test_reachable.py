"""Names on a Hub that does not answer: told at once, by every command that takes one, and not after a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from peft_variator.cli.main import app
from peft_variator.model_files import check_reachable, read_model_config
from peft_variator.sentence_folder import sentence_files
from peft_variator.training import load_plugin


NAME = "someone/no-such-model"


@pytest.fixture(params=["offline", "no network"])
def unreachable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that nobody reaches, and waiting for it is an error."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s for the Hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(time, "sleep", wait)


@pytest.mark.parametrize("unreachable", ["offline"], indirect=True)
@pytest.mark.parametrize(
    "words",
    [
        ["train", NAME, "--data", "{data}", "--output", "{output}"],
        ["restore", NAME, "--data", "{data}", "--output", "{output}"],
        ["prune", NAME, "--method", "magnitude", "--sparsity", "0.5", "--output", "{output}"],
        ["bench", NAME],
        ["bench", "--adapter", NAME],
        ["evaluate", NAME, "--data", "{data}"],
        ["serve", NAME],
        ["info", NAME],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("unreachable")
def test_every_command_says_so_at_once(words: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("a b c\n")
    places = {"data": data, "output": tmp_path / "output"}
    done = CliRunner().invoke(app, [word.format(**places) for word in words])
    assert done.exit_code == 1
    assert NAME in done.output
    assert "HF_HUB_OFFLINE" in done.output
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("load", [read_model_config, lambda name: load_plugin(None, name)])  # type: ignore[arg-type]
@pytest.mark.usefixtures("unreachable")
def test_so_does_the_library(load: Callable[[str], Any]) -> None:
    with pytest.raises(OSError, match=f"{NAME}.*can't be reached"):
        load(NAME)


@pytest.mark.usefixtures("unreachable")
def test_what_is_here_is_not_asked_for(tmp_path: Path) -> None:
    check_reachable(str(tmp_path))
    assert sentence_files(NAME) == {}
