"""What a machine needs to run the products of a few tokens."""

from __future__ import annotations

import pytest

from peft_variator.weight_kernels.compiled import LEVELS, load_compiled


def needs_product(level: int = 0) -> None:
    """Skip where there is no compiler, or the processor lacks an instruction set, an index into `LEVELS`."""
    loaded = load_compiled("products")
    if loaded.function is None:
        pytest.skip(loaded.reason)
    if level > loaded.level:
        pytest.skip(f"this processor has no {LEVELS[level]}")
