"""Choosing the fastest of several ways to compute the same, by measuring them once."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType

import torch


__all__ = ["MEASURED", "fastest"]

_SAMPLES = 3
_MEASURED: dict[Hashable, dict[str, float]] = {}
_MEASURING = threading.Lock()

MEASURED: Mapping[Hashable, Mapping[str, float]] = MappingProxyType(_MEASURED)
"""Seconds of each way, by what was measured; infinite for one that failed."""


def fastest(key: Hashable, ways: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """The name of the fastest way, measured at the first call with a key and remembered while the process runs.

    Args:
        key: what the answer depends on: shapes, dtype, device, threads.
        ways: the ways by name. The first is taken where nothing can be measured, since a CUDA graph is being captured.
            One that fails is left out with a warning, but for the first, whose error is raised.
        device: where they are computed.
    """
    plain = next(iter(ways))
    if key not in _MEASURED:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return plain  # nothing can be waited for: a shape is measured when it is called before it is captured
        with _MEASURING:  # two that measure at once would measure each other
            if key not in _MEASURED:
                _MEASURED[key] = {name: _seconds(name, run, device, name == plain) for name, run in ways.items()}
    seconds = _MEASURED[key]
    return min((name for name in ways if name in seconds), key=seconds.__getitem__, default=plain)


def _seconds(name: str, run: Callable[[], object], device: torch.device, needed: bool) -> float:
    """The least of a few times; infinite if it fails and is not needed."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        if device.type == "cuda":
            run()  # kernels are compiled, and weights arranged, in the first call
        times = []
        for _ in range(_SAMPLES):
            wait()
            start = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - start)
        return min(times)
    except Exception as error:  # whatever a library that is asked for a shape it does not know raises
        if needed:
            raise
        warnings.warn(
            f"{name} fails on {device} and is not used for this shape: {type(error).__name__}: {error}", stacklevel=2
        )
        return float("inf")
