"""The example that trains a plugin with sentence-transformers' trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_tiny_run(tmp_path: Path) -> None:
    script = ROOT / "examples" / "sentence_transformers" / "train_plugin.py"
    words = [sys.executable, str(script), "--tiny", "--output", str(tmp_path / "plugin")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = [line.rpartition(" ")[2] for line in done.stdout.splitlines() if "the base" in line or "saved" in line]
    first, second = figures
    assert first == second
    assert (tmp_path / "plugin" / "modules.json").is_file()
