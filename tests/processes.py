"""Several processes for a test: forked from one that has imported the libraries, for which each would take seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


IMPORTED = ["accelerate", "peft", "peft_variator.training", "torch", "transformers.trainer"]


def run_processes(work: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Run `work(rank, *args)` in several processes at once, and wait for them.

    They have nothing of this one, whose tests leave things behind, but its environment and what they are given.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    torch.multiprocessing.start_processes(work, args, nprocs=count, start_method="forkserver")
