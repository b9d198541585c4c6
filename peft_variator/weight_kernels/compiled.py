"""Compiling and loading the C++, a source at its first use; without a compiler `load_compiled` says why."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..compat import are_operators_watched
from ..files import cache_folder


__all__ = ["LEVELS", "SWITCH", "Compiled", "Source", "find_compiler", "load_compiled", "runs_on"]

LEVELS = ("portable C++", "AVX2", "AVX-512", "AVX-512 with VBMI2 and BF16")
"""Instruction sets, by the number that the C++ knows them by; the last is for 16 bits alone."""

SWITCH = "PEFT_VARIATOR_PACKED_PRODUCT"
"""Environment variable: 0 leaves all of it off, and nothing is compiled."""

Source = Literal["products", "unpacking", "masked_weight"]
"""The sources, by name. Each is compiled by itself, since few processes need all of them."""

# Each has one function of addresses, lengths and small numbers, in this order.
_FUNCTIONS: dict[Source, tuple[str, int, int, int]] = {
    "products": ("few_tokens_linear", 8, 4, 3),
    "unpacking": ("unpack_two_four", 3, 2, 3),
    "masked_weight": ("masked_weight", 8, 3, 3),
}
_HEADER = Path(__file__).with_name("weights.h")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 600


@dataclass(frozen=True)
class Compiled:
    """What came of compiling and loading a source.

    Args:
        level: index into `LEVELS` of the best instruction set of this processor; -1: it can't be used.
        reason: why, in one clause.
        function: the C function; `None`: it can't be used.
    """

    level: int
    reason: str
    function: Any = None


def runs_on(name: Source, *tensors: Tensor | None, level: int = 0) -> bool:
    """Whether a source's function takes these tensors in this call: plain ones on a CPU, where nobody has to see the
    operators (compilers, programs that are traced, FLOP counters, function transforms).

    Args:
        name: the source.
        tensors: what it reads and writes; `None` is left out.
        level: the least instruction set that it is for, an index into `LEVELS`.
    """
    return (
        not torch.compiler.is_compiling()
        and all(tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu) for tensor in tensors)
        and not torch.jit.is_tracing()
        and not are_operators_watched()
        and load_compiled(name).level >= level
    )


def find_compiler() -> str | None:
    """Path of the C++ compiler that is used: what `CXX` names, or the first of c++, g++ and clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


@lru_cache(maxsize=8)
def load_compiled(name: Source) -> Compiled:
    """Compile a source unless this machine has it compiled already, and load it; never raises."""
    if os.environ.get(SWITCH) == "0":
        return Compiled(-1, f"{SWITCH}=0 leaves it off")
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or ", ".join(_COMPILERS)
        return Compiled(-1, f"there is no C++ compiler ({wanted})")
    symbol, addresses, lengths, numbers = _FUNCTIONS[name]
    try:
        library = _load(compiler, _HEADER.with_name(f"{name}.cpp"))
        function = getattr(library, symbol)
    except (AttributeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
        return Compiled(-1, f"{compiler} failed: {next((line for line in told if 'error' in line), told[0])}")
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * addresses + [ctypes.c_long] * lengths + [ctypes.c_int] * numbers
    level = library.best_level()
    return Compiled(level, f"compiled by {compiler} for {LEVELS[level]}", function)


def _load(compiler: str, source: Path) -> ctypes.CDLL:
    """The library, compiled anew where the one in the cache can't be loaded."""
    path = _library(compiler, source)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(_library(compiler, source)))


def _library(compiler: str, source: Path) -> Path:
    """The shared library, from the user's cache where it can be kept there."""
    made_by = f"{os.path.realpath(compiler)} {os.stat(compiler).st_mtime_ns} {_FLAGS} {sys.platform}"
    made_of = source.read_bytes() + _HEADER.read_bytes() + made_by.encode()
    name = f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / name
        if library.exists():
            if library.stat().st_uid != os.getuid():  # code that someone else may have put there is not run
                raise PermissionError(f"{library} belongs to another user.")
            return library
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(compiler, source, Path(scratch) / name)
            with made.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut may leave half of it under its name
            os.replace(made, library)
        return library
    except (OSError, RuntimeError):  # no home, or one that is not written to
        return _compile(compiler, source, _scratch() / name)


@lru_cache(maxsize=1)
def _scratch() -> Path:
    """A folder that lasts as long as the process, and is not taken away by the end of one that was forked from it."""
    folder, owner = tempfile.mkdtemp(prefix="peft-variator-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _compile(compiler: str, source: Path, library: Path) -> Path:
    """Compile for as many threads as torch uses if the compiler can, else for one."""
    command = [compiler, *_FLAGS, str(source), "-o", str(library)]
    options: dict[str, Any] = {
        "check": True,
        "capture_output": True,
        "text": True,
        "errors": "replace",  # a compiler may print what is not of the locale
        "timeout": _COMPILE_SECONDS,
    }
    try:
        # The library's OpenMP is torch's own where torch brings libgomp under its plain name: it is loaded already.
        subprocess.run([*command, "-fopenmp"], **options)
    except subprocess.CalledProcessError:
        subprocess.run(command, **options)
    return library
