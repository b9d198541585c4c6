"""The product of a packed 2:4 weight and a few tokens: on a CPU in C++ that is compiled at its first use, on a GPU in
Triton (`packed_triton`).

One token needs every weight once: a product that reads the packed form as it lies moves 0.5625 of the bytes of a dense
one in 16 bits. With more tokens unpacking pays. Which is faster on this machine is measured at the first call of each
shape and remembered while the process runs. Without a compiler everything runs as before, and `load_product` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import are_operators_watched
from ..triton_support import runs_triton, triton_state


__all__ = [
    "LEVELS",
    "MAX_TOKENS",
    "MIN_WEIGHTS",
    "SWITCH",
    "LoadedProduct",
    "describe_product",
    "find_compiler",
    "is_faster",
    "load_product",
    "multiply",
]

LEVELS = ("portable C++", "AVX2", "AVX-512", "AVX-512 with VBMI2 and BF16")
"""Instruction sets, by the number that the C++ knows them by; the last is for bfloat16 alone."""

MAX_TOKENS = 16
"""The most tokens that it is tried for."""

MIN_WEIGHTS = 1 << 18
"""Layers with fewer weights lie in the caches, where there is nothing to gain."""

SWITCH = "PEFT_VARIATOR_PACKED_PRODUCT"
"""Environment variable: 0 leaves the product off, and nothing is compiled."""

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
_DTYPES = (torch.bfloat16, torch.float32)
_COMPILERS = ("c++", "g++", "clang++")
_SAMPLES = 3
_COMPILE_SECONDS = 600


@dataclass(frozen=True)
class LoadedProduct:
    """What came of compiling and loading the C++.

    Args:
        level: index into `LEVELS` of the best instruction set of this processor; -1: the product can't be used.
        reason: why, in one clause.
        function: the C function; `None`: the product can't be used.
    """

    level: int
    reason: str
    function: Any = None


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
    function = library.packed_linear
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3 + [ctypes.c_int] * 3
    level = library.packed_level()
    return LoadedProduct(level, f"compiled by {compiler} for {LEVELS[level]}", function)


def _compiled(compiler: str) -> Path:
    """The shared library, from the user's cache where it can be kept there."""
    made_by = f"{os.path.realpath(compiler)} {os.stat(compiler).st_mtime_ns} {_FLAGS} {sys.platform}"
    name = "packed_product-" + hashlib.sha256(_SOURCE.read_bytes() + made_by.encode()).hexdigest()[:16] + ".so"
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


def describe_product(out_features: int, in_features: int, dtype: torch.dtype, device_type: str = "cpu") -> str | None:
    """What a layer does for a few tokens and why, in one clause; `None`: it is too small, or on another device.

    Args:
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: dtype of the product.
        device_type: where it is computed, as in `torch.device.type`.
    """
    if out_features * in_features < MIN_WEIGHTS or device_type not in ("cpu", "cuda"):
        return None
    if device_type == "cuda":
        runs, reason = triton_state(device_type)
        if not runs:
            return f"also for few tokens, since the product of the packed form can't be used: {reason}"
        return (
            f"but up to {MAX_TOKENS} tokens take the product of the packed form ({reason}) where it is measured faster"
        )
    if dtype not in _DTYPES:
        return f"also for few tokens, since the product of the packed form has no {str(dtype).removeprefix('torch.')}"
    product = load_product()
    if product.function is None:
        return f"also for few tokens, since the product of the packed form can't be used: {product.reason}"
    level = LEVELS[min(product.level, 2 if dtype == torch.float32 else 3)]
    return f"but up to {MAX_TOKENS} tokens take the product of the packed form ({level}) where it is measured faster"


def multiply(
    input: Tensor, bias: Tensor | None, compressed: Tensor, bitmask: Tensor, level: int | None = None
) -> Tensor:
    """x·Wᵀ + b from the packed W, summed in float32.

    Args:
        input: (..., in_features), bfloat16 or float32 on a CPU, float16 as well on a GPU.
        bias: (out_features,), of the same dtype.
        compressed: (out_features, in_features / 2), of the same dtype.
        bitmask: uint8 (out_features, ceil(in_features / 8)), two bits in each group of four.
        level: index into `LEVELS`, on a CPU; by default the best of this processor.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: the product can't be used here, or the processor lacks the instruction set.
    """
    if input.is_cuda:
        return _multiply_by_triton(input, bias, compressed, bitmask)
    product = load_product()
    if product.function is None:
        raise RuntimeError(f"The product of the packed form can't be used: {product.reason}.")
    if level is not None and not 0 <= level <= product.level:
        raise RuntimeError(f"level is {level}; this processor has 0 to {product.level}.")
    rows, columns = compressed.shape[0], 2 * compressed.shape[1]
    x = input.detach().reshape(-1, columns).contiguous()
    compressed, bitmask = compressed.detach().contiguous(), bitmask.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    output = x.new_empty(x.shape[0], rows)
    threads = max(1, min(torch.get_num_threads(), rows))
    product.function(
        x.data_ptr(),
        compressed.data_ptr(),
        bitmask.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        x.shape[0],
        rows,
        columns,
        x.element_size(),
        product.level if level is None else level,
        threads,
    )
    return output.view(*input.shape[:-1], rows)


def _multiply_by_triton(input: Tensor, bias: Tensor | None, compressed: Tensor, bitmask: Tensor) -> Tensor:
    runs, reason = triton_state("cuda")
    if not runs:
        raise RuntimeError(f"The product of the packed form can't be used: {reason}.")
    from .packed_triton import multiply_triton

    x = input.detach().reshape(-1, input.shape[-1]).contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    output = multiply_triton(x, bias, compressed.detach().contiguous(), bitmask.contiguous())
    return output.view(*input.shape[:-1], compressed.shape[0])


_FASTER: dict[tuple[Any, ...], bool] = {}
_MEASURING = threading.Lock()


def is_faster(
    input: Tensor, bias: Tensor | None, compressed: Tensor, bitmask: Tensor, dense: Callable[[], Tensor]
) -> bool:
    """Whether `multiply` is faster than what is done else, measured at the first call of each shape and thread count.

    Args:
        input: as in `multiply`, and so on.
        bias: its bias.
        compressed: its kept values.
        bitmask: its mask.
        dense: the same product by unpacking.
    """
    tokens = input.numel() // max(input.shape[-1], 1)
    if not 0 < tokens <= MAX_TOKENS or 2 * compressed.numel() < MIN_WEIGHTS or not _can_take(input, bias, compressed):
        return False
    key = (*compressed.shape, input.dtype, tokens, input.device, torch.get_num_threads())
    if key not in _FASTER:
        if input.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be waited for: a shape is measured when it is called before it is captured
        with _MEASURING:  # two that measure at once would measure each other
            if key not in _FASTER:
                _FASTER[key] = _measure(lambda: multiply(input, bias, compressed, bitmask), input.device) < _measure(
                    dense, input.device
                )
    return _FASTER[key]


def _can_take(input: Tensor, bias: Tensor | None, compressed: Tensor) -> bool:
    """Whether these are plain tensors that the product of their device reads, and nobody has to see the operators."""
    tensors = [input, compressed] if bias is None else [input, compressed, bias]
    if input.is_cuda:
        return runs_triton(*tensors)
    return (
        input.dtype in _DTYPES
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.dtype == input.dtype for tensor in tensors)
        and not torch.jit.is_tracing()
        and not are_operators_watched()
        and load_product().function is not None
    )


def _measure(run: Callable[[], Tensor], device: torch.device) -> float:
    """The least of a few times, in seconds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    if device.type == "cuda":
        run()  # Triton compiles in the first call
    for _ in range(_SAMPLES):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)
