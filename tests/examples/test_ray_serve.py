"""The deployment of Ray Serve, with a tiny model: started, asked by many at once, ended. Ray is no dependency."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.runtime.models import encoder, made_table, tokenizer


pytest.importorskip("ray", reason="needs Ray: pip install 'ray[serve]'")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "ray_serve" / "serve.py"


@pytest.mark.slow
def test_replicas_answer_and_end(tmp_path):
    model = encoder()
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    made_table(ratios=(1, 2, 8)).save(tmp_path / "table.json")
    folders = [tmp_path / "base", "--adapter", tmp_path / "adapter", "--table", tmp_path / "table.json"]
    # Nobody's deadline can be met, so all are answered at the fastest ratio but those that name another.
    options = ["--slo-ms", "1e-6", "--port", free_port(), "--ask", "a b c"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, [*folders, *options])], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "32 answers, vectors of 32, at the ratios [8]" in done.stdout
    assert "By handle: [1]" in done.stdout
