"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch


__all__ = ["describe_environment"]

_PACKAGES = ("peft-variator", "peft", "torch", "transformers")


def describe_environment(device: torch.device) -> dict[str, str | int | float]:
    """Machine and versions, ready for JSON.

    `threads` is the number of CPU threads that torch uses now. `load_average` is the number of processes that wanted
    to run in the last minute, which tells whether the machine was busy with something else; Windows has none.

    Args:
        device: where the work runs.
    """
    facts: dict[str, str | int | float] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if sys.platform != "win32":
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts | {package: version(package) for package in _PACKAGES}


def _cpu_name() -> str:
    """The model's name where Linux tells it, else what Python knows of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
