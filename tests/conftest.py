"""What holds for all tests."""

from __future__ import annotations

import gc
import os


# Nothing is remembered of checkpoints in the home of whoever runs the tests. Processes that a test starts inherit it.
os.environ["PEFT_VARIATOR_REMEMBER_CHECKS"] = "0"


def pytest_collection_finish() -> None:
    """Let `gc.collect`, which every `Trainer.train` calls, pass over what the imports have made."""
    gc.collect()
    gc.freeze()
