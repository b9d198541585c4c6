"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Let `gc.collect`, which every `Trainer.train` calls, pass over what the imports have made."""
    gc.collect()
    gc.freeze()
