"""Triton's kernels agree with the plain functions, by Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from peft_variator.triton_support import SWITCH, runs_triton, triton_state


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASES = str(Path(__file__).with_name("cases.py"))


def run_cases(interpreted: bool, marked: str) -> None:
    """The cases in a process of their own, which imports Triton as the cases need it."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        "-m",
        marked,
        CASES,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
def test_by_the_interpreter() -> None:
    run_cases(interpreted=True, marked="not slow")


@needs_triton
@pytest.mark.slow
def test_by_the_interpreter_at_length() -> None:
    run_cases(interpreted=True, marked="slow")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, on which kernels are compiled")
def test_on_a_gpu() -> None:
    run_cases(interpreted=False, marked="slow or not slow")


def test_without_a_gpu_the_plain_functions_run_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_state.cache_clear()
    assert not runs_triton(torch.ones(2))
    assert "not cpu" in triton_state("cpu").reason
    monkeypatch.setenv(SWITCH, "0")
    triton_state.cache_clear()
    assert f"{SWITCH}=0" in triton_state("cuda").reason
    triton_state.cache_clear()
