"""Tests that every method has to pass, as classes to inherit from."""

import pytest


for _part in ("adapters", "base", "config", "merging", "precision", "saving", "training", "transformers"):
    pytest.register_assert_rewrite(f"tests.common.contract_{_part}")
