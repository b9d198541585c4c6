"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from ..version import __version__


__all__ = ["describe_environment", "was_busy"]

_PACKAGES = ("peft", "torch", "transformers")
_MOMENT = 0.3  # seconds
_MOST_IN_USE = 0.15


def describe_environment(device: torch.device) -> dict[str, str | int | float]:
    """Machine and versions, ready for JSON.

    `threads` is the number of CPU threads that torch uses now. `cpu_in_use` is the share of all cores that was busy
    while this process slept for a moment: with something else. `load_average` is the number of processes that wanted
    to run in the last minute, this one among them; Windows has none.

    Args:
        device: where the work runs.
    """
    facts: dict[str, str | int | float] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_in_use": round(psutil.cpu_percent(interval=_MOMENT) / 100, 2),
    }
    if sys.platform != "win32":
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts | {"peft-variator": __version__} | {package: version(package) for package in _PACKAGES}


def was_busy(environment: Mapping[str, Any]) -> bool:
    """Whether something else ran when a measurement began, so that its times are not to be trusted.

    Args:
        environment: what `describe_environment` gave then.
    """
    return bool(environment["device"] == "cpu" and environment.get("cpu_in_use", 0) > _MOST_IN_USE)


def _cpu_name() -> str:
    """The model's name where Linux tells it, else what Python knows of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
