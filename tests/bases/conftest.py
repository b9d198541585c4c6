"""A dense 2:4 Llama on disk, and its packed form, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from peft_variator.bases import pack_checkpoint

from .models import tiny_llama


@pytest.fixture(scope="session")
def dense_source(tmp_path_factory) -> Path:
    """A dense 2:4 Llama, in one file. Not to be written to."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_source(dense_source, tmp_path_factory) -> Path:
    """The same model packed. Not to be written to."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    pack_checkpoint(dense_source, folder)
    return folder


@pytest.fixture
def dense_dir(dense_source, tmp_path) -> Path:
    """A copy of the dense model."""
    return Path(shutil.copytree(dense_source, tmp_path / "dense"))


@pytest.fixture
def packed_dir(packed_source, tmp_path) -> Path:
    """A copy of the packed model."""
    return Path(shutil.copytree(packed_source, tmp_path / "packed"))
