"""`peft-variator doctor`: what it says of this machine, and of one that lacks something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peft_variator.cli import doctor
from peft_variator.cli.main import app
from peft_variator.profiling import num_threads
from peft_variator.version import __version__
from peft_variator.weight_kernels.compiled import Compiled, load_compiled
from peft_variator.weight_kernels.masked_weight import LEAST_LEVEL


@pytest.fixture(autouse=True)
def fresh() -> None:
    load_compiled.cache_clear()


def asked(*words: str) -> tuple[dict, str, str]:
    done = CliRunner().invoke(app, ["doctor", "--json", "-", *words])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), done.stdout, done.stderr


def test_what_is_here_is_told(tmp_path: Path) -> None:
    facts, _, told = asked()
    assert facts["versions"]["torch"]["installed"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["in_tested_range"] is True
    assert facts["devices"][0]["name"] == "cpu"
    assert all(kernel["reason"] for kernel in facts["kernels"])
    packed = facts["kernels"][0]
    assert packed["runs"] == (load_compiled("products").function is not None)
    for words in ("Versions", "torch", "Devices", "Kernels", packed["reason"]):
        assert words in told
    compiled = {kernel["name"]: kernel for kernel in facts["kernels"][:3]}
    assert all(kernel["device"] == "cpu" for kernel in compiled.values())
    masked = compiled["SparseLoRA's masked weight in training"]
    assert masked["runs"] == (load_compiled("masked_weight").level >= LEAST_LEVEL)
    by_triton = [kernel for kernel in facts["kernels"] if "Triton" in kernel["name"]]
    assert by_triton[0]["device"] == "cpu"
    assert not by_triton[0]["runs"]
    assert "not cpu" in by_triton[0]["reason"]
    path = tmp_path / "facts.json"
    done = CliRunner().invoke(app, ["doctor", "--json", str(path)])
    assert json.loads(path.read_text()).keys() == facts.keys()
    assert packed["reason"] in done.stdout


@pytest.mark.parametrize(("threads", "told"), [(1, ", 1 thread, "), (2, ", 2 threads, ")])
def test_threads_are_counted(threads: int, told: str) -> None:
    with num_threads(threads):
        assert told in asked()[0]["devices"][0]["description"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    facts, _, told = asked()
    assert facts["compiler"] is None
    reasons = {kernel["name"]: kernel["reason"] for kernel in facts["kernels"] if not kernel["runs"]}
    assert "no-such-compiler" in reasons["packed 2:4, one to a few tokens"]
    assert "does not run" in told


def test_a_processor_without_what_a_kernel_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "load_compiled", lambda source: Compiled(1, "compiled for AVX2", print))
    facts, _, _ = asked()
    runs = {kernel["name"]: (kernel["runs"], kernel["reason"]) for kernel in facts["kernels"][:3]}
    assert runs["packed 2:4, unpacking"] == (True, "compiled for AVX2")
    assert runs["SparseLoRA's masked weight in training"] == (False, "this processor has no AVX-512")


def test_a_version_outside_of_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "99.0" if name == "peft" else kept(name))
    facts, _, told = asked("--quiet")
    assert facts["in_tested_range"] is False
    assert facts["versions"]["peft"] == {"installed": "99.0", "tested": "<0.22,>=0.21.2", "in_range": False}
    assert "peft 99.0" in told


def test_metadata_of_an_earlier_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1" if name == "peft-variator" else kept(name))
    facts, _, told = asked("--quiet")
    assert facts["versions"]["peft-variator"]["installed"] == __version__
    assert "0.0.1" in told
