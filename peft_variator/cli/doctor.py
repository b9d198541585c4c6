"""`peft-variator doctor`: versions, devices and compiler of this machine, which kernels run on it, and why not."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from ..bases.kernels import Accelerator, choose_kernel
from ..profiling import describe_environment
from ..triton_support import triton_state
from ..tuners.variator.fused import FUSED_WIDTH
from ..version import __version__
from ..weight_kernels.compiled import LEVELS, Source, find_compiler, load_compiled
from ..weight_kernels.masked_weight import LEAST_LEVEL
from .console import Reporter


__all__ = ["doctor"]

PACKAGE = "peft-variator"
PLAIN_ON_GPUS = (
    f'the plain functions merge with scoring="concat", and expand where a correction is more than {FUSED_WIDTH} wide'
)
# What kernels look for.
CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"),
    *("asimd", "bf16", "sve"),
)
LARGE = (4096, 4096)
# Kernels in C++: the source, what it is for, and the least instruction set, an index into `LEVELS`.
_COMPILED: dict[Source, tuple[str, int]] = {
    "products": ("packed 2:4, one to a few tokens", 0),
    "unpacking": ("packed 2:4, unpacking", 0),
    "masked_weight": ("SparseLoRA's masked weight in training", LEAST_LEVEL),
}


@dataclass(frozen=True)
class Version:
    """An installed package beside the versions that this one is tested with.

    Args:
        installed: its version; `None`: it is not installed.
        tested: range of versions; empty: any.
        in_range: whether the installed version lies in it.
    """

    installed: str | None
    tested: str
    in_range: bool


@dataclass(frozen=True)
class KernelState:
    """Whether a kernel runs here.

    Args:
        device: the device it is for.
        name: what it computes, and by what.
        runs: whether it does.
        reason: why, or why not.
    """

    device: str
    name: str
    runs: bool
    reason: str


def doctor(reporter: Reporter) -> None:
    """Look at this machine and tell.

    Raises:
        OSError: the JSON can't be written where it was asked for.
    """
    reporter.check()
    versions, features, compiler = _versions(), _cpu_features(), _compiler()
    devices, kernels = _devices(), _kernels()
    machine = describe_environment(torch.device("cpu"))
    reporter.say("Versions")
    for name, found in versions.items():
        tested = f"tested: {found.tested}" if found.tested else "any version"
        reporter.say(f"  {name} {found.installed or 'is not installed'} ({tested})")
    reporter.say(f"  Python {machine['python']}, {machine['system']}", "Devices")
    reporter.say(*(f"  {device['name']}: {device['description']}" for device in devices))
    reporter.say(f"CPU features\n  {', '.join(features) or 'none that kernels look for are known'}")
    reporter.say(f"C++ compiler\n  {compiler or 'none: c++, g++ and clang++ are not on the path, CXX names another'}")
    reporter.say("Kernels")
    for kernel in kernels:
        reporter.say(f"  {kernel.device}, {kernel.name}: {'runs' if kernel.runs else 'does not run'}; {kernel.reason}")
    outside = [name for name, found in versions.items() if not found.in_range]
    for name in outside:
        found = versions[name]
        reporter.warn(f"{name} {found.installed or 'is missing'}: outside of the tested range {found.tested}.")
    recorded = _installed(PACKAGE)
    if recorded not in (None, __version__):
        reporter.warn(
            f"{PACKAGE} was installed as {recorded} and is {__version__} now: the tested ranges above are those of "
            f"{recorded}. Install it again, by `pip install --editable .` where it was installed so."
        )
    facts = {
        "versions": {name: asdict(found) for name, found in versions.items()},
        "in_tested_range": not outside,
        "machine": machine,
        "devices": devices,
        "cpu_features": features,
        "compiler": compiler,
        "kernels": [asdict(kernel) for kernel in kernels],
    }
    reporter.write_json(json.dumps(facts, indent=2))


def _versions() -> dict[str, Version]:
    """This package and what it requires, extras left out."""
    found = {PACKAGE: Version(__version__, "", True)}
    for text in requires(PACKAGE) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _installed(requirement.name)
        tested = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        found[requirement.name] = Version(installed, str(requirement.specifier), tested)
    return found


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    memory, threads = psutil.virtual_memory().total, torch.get_num_threads()
    cpu = describe_environment(torch.device("cpu"))
    cores = cpu["cores"]
    counted = f"{cores} core{'' if cores == 1 else 's'}, {threads} thread{'' if threads == 1 else 's'}"
    described = f"{cpu['cpu']}, {counted}, {_gib(memory)}"
    devices: list[dict[str, Any]] = [{"name": "cpu", "description": described, "memory_bytes": memory}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        described = f"{facts.name}, compute capability {facts.major}.{facts.minor}, {_gib(facts.total_memory)}"
        devices.append({"name": f"cuda:{index}", "description": described, "memory_bytes": facts.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "description": platform.processor(), "memory_bytes": memory})
    return devices


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that Linux lists; elsewhere what torch calls the processor's capability."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return [torch.backends.cpu.get_cpu_capability()]
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    return [name for name in CPU_FEATURES if name in words]


def _compiler() -> str | None:
    """Path and version of the C++ compiler."""
    path = find_compiler()
    if path is None:
        return None
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        told = []
    return f"{path} ({told[0]})" if told else f"{path}, which does not tell its version"


def _compiled_kernel(source: Source, name: str, level: int) -> KernelState:
    """Whether the C++ of a source runs, which is compiled for it where it was not yet."""
    compiled = load_compiled(source)
    if 0 <= compiled.level < level:
        return KernelState("cpu", name, False, f"this processor has no {LEVELS[level]}")
    return KernelState("cpu", name, compiled.level >= level, compiled.reason)


def _kernels() -> list[KernelState]:
    kernels = [_compiled_kernel(source, *kernel) for source, kernel in _COMPILED.items()]
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        choice = choose_kernel(*LARGE, torch.bfloat16, Accelerator.of(torch.device(device)))
        runs = choice.kernel != "dense"
        kernels.append(KernelState(device, "packed 2:4 by sparse tensor cores", runs, choice.reason))
        state = triton_state(torch.device(device).type)
        reason = f"{state.reason}; {PLAIN_ON_GPUS}" if state.runs else state.reason
        kernels.append(KernelState(device, "merging and expanding of plugins, by Triton", state.runs, reason))
        if device != "cpu":
            kernels.append(KernelState(device, _COMPILED["products"][0], *state))
    return [*kernels, *_compiled_graphs()]


def _compiled_graphs() -> list[KernelState]:
    """What `torch.compile` needs: a C++ compiler for CPUs, Triton for GPUs."""
    has_compiler, has_triton = find_compiler() is not None, find_spec("triton") is not None
    states = [
        KernelState(
            "cpu", "torch.compile", has_compiler, "a C++ compiler is there" if has_compiler else "no C++ compiler"
        )
    ]
    for index in range(torch.cuda.device_count()):
        reason = "Triton is installed" if has_triton else "Triton is not installed"
        states.append(KernelState(f"cuda:{index}", "torch.compile", has_triton, reason))
    return states
