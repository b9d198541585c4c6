"""Compiling and loading `products.cpp`, at the first use of it; without a compiler `load_product` says why."""

from __future__ import annotations

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
from typing import Any


__all__ = ["LEVELS", "SWITCH", "LoadedProduct", "find_compiler", "load_product"]

LEVELS = ("portable C++", "AVX2", "AVX-512", "AVX-512 with VBMI2 and BF16")
"""Instruction sets, by the number that the C++ knows them by; the last is for bfloat16 alone."""

SWITCH = "PEFT_VARIATOR_PACKED_PRODUCT"
"""Environment variable: 0 leaves the product off, and nothing is compiled."""

_SOURCE = Path(__file__).with_name("products.cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 600


@dataclass(frozen=True)
class LoadedProduct:
    """What came of compiling and loading the C++.

    Args:
        level: index into `LEVELS` of the best instruction set of this processor; -1: the product can't be used.
        reason: why, in one clause.
        function: the C function of the products; `None`: nothing of it can be used.
        unpack: the C function that unpacks.
    """

    level: int
    reason: str
    function: Any = None
    unpack: Any = None


def find_compiler() -> str | None:
    """Path of the C++ compiler that is used: what `CXX` names, or the first of c++, g++ and clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


@lru_cache(maxsize=1)
def load_product() -> LoadedProduct:
    """Compile the C++ unless this machine has it compiled already, and load it; never raises."""
    if os.environ.get(SWITCH) == "0":
        return LoadedProduct(-1, f"{SWITCH}=0 leaves it off")
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or ", ".join(_COMPILERS)
        return LoadedProduct(-1, f"there is no C++ compiler ({wanted})")
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return LoadedProduct(-1, f"{compiler} failed: {told.strip().splitlines()[0] if told.strip() else error!r}")
    function = library.few_tokens_linear
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 4 + [ctypes.c_int] * 3
    unpack = library.unpack_two_four
    unpack.restype = None
    unpack.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 2 + [ctypes.c_int] * 3
    level = library.best_level()
    return LoadedProduct(level, f"compiled by {compiler} for {LEVELS[level]}", function, unpack)


def _compiled(compiler: str) -> Path:
    """The shared library, from the user's cache where it can be kept there."""
    made_by = f"{os.path.realpath(compiler)} {os.stat(compiler).st_mtime_ns} {_FLAGS} {sys.platform}"
    name = "products-" + hashlib.sha256(_SOURCE.read_bytes() + made_by.encode()).hexdigest()[:16] + ".so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_variator"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / name
        if library.exists():
            if library.stat().st_uid != os.getuid():  # code that someone else may have put there is not run
                raise PermissionError(f"{library} belongs to another user.")
            return library
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(compiler, Path(scratch) / name)
            os.replace(made, library)
        return library
    except (OSError, RuntimeError):  # no home, or one that is not written to
        return _compile(compiler, Path(_scratch().name) / name)


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that lasts as long as the process."""
    return tempfile.TemporaryDirectory(prefix="peft-variator-")


def _compile(compiler: str, library: Path) -> Path:
    """Compile for as many threads as torch uses if the compiler can, else for one."""
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(library)]
    options: dict[str, Any] = {"check": True, "capture_output": True, "text": True, "timeout": _COMPILE_SECONDS}
    try:
        # The library's OpenMP is torch's own where torch brings libgomp under its plain name: it is loaded already.
        subprocess.run([*command, "-fopenmp"], **options)
    except subprocess.CalledProcessError:
        subprocess.run(command, **options)
    return library
