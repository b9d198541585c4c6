"""Several processes for a test: forked from one that has imported the libraries, for which each would take seconds."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed
import torch.multiprocessing


IMPORTED = ["accelerate", "peft", "peft_variator.training", "torch", "transformers.trainer"]

SECONDS = 120
"""How long all of it may take; it takes a tenth of that."""


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_processes(work: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Run `work(rank, *args)` in several processes of one gloo group at once, and wait for them.

    They have nothing of this one, whose tests leave things behind, but its environment and what they are given.
    A start can stand still for good, seldom, for what is not ours: a lock that a thread held in the process they are
    forked from, or the end of gloo. They are killed then and started once more, with a warning; what stands still
    again is an error. `work` may therefore find what it wrote before.

    Raises:
        TimeoutError: they did not end; the stack of each is on the error stream.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    # Arrow's allocator starts a thread when it is imported, and what a thread holds is held in every fork for good.
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
    for last in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            group = Path(folder, "group")
            context = torch.multiprocessing.start_processes(
                _in_group, (group, count, work, args), nprocs=count, join=False, start_method="forkserver"
            )
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                if context.join(1):
                    return
            for process in context.processes:
                process.kill()
                process.join()
        if last:
            raise TimeoutError(f"{work.__qualname__} in {count} processes did not end within {SECONDS} s, twice.")
        warnings.warn(f"{work.__qualname__} in {count} processes stood still and is started again.", stacklevel=2)


def _in_group(rank: int, group: Path, count: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(SECONDS - 10)
    torch.set_num_threads(1)
    # Accelerate wants to be told what a launcher tells, though the processes find each other by a file.
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.distributed.init_process_group("gloo", f"file://{group}", rank=rank, world_size=count)
    work(rank, *args)
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
