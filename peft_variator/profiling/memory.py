"""The most memory that a piece of work holds at any moment."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


__all__ = ["peak_memory"]


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` holds at its peak beyond what was held before: activations and buffers, not weights or inputs.

    On CUDA this is the peak of torch's caching allocator. On the CPU every allocation and release that torch's
    allocator makes in this thread while `run` runs is traced by `torch.profiler`, and the peak of their running sum is
    taken, to the byte and whatever other processes do. Buffers that math libraries keep for themselves are seen by
    neither.

    Args:
        run: the work; its result is dropped.
        device: where it runs, the CPU or a CUDA device.

    Raises:
        ValueError: another kind of device.
    """
    measures = {"cpu": _peak_on_cpu, "cuda": _peak_on_cuda}
    if device.type not in measures:
        raise ValueError(f"Peak memory is measured on {' and '.join(measures)} devices, not on {device.type!r}.")
    return measures[device.type](run, device)


def _peak_on_cuda(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], object], device: torch.device) -> int:
    with _without_announcements(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


@contextmanager
def _without_announcements() -> Iterator[None]:
    """Take out of the error stream the lines in which torch's profiler announces that it starts and stops.

    Its library writes them to the file descriptor, at a level that can only be set before torch is imported. Whatever
    else is written meanwhile comes out behind it.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not line.startswith(b"USDT:")))
