"""C++ kernels for the CPU, compiled on first use and kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm.common.cache import cache_root
from dgm.common.errors import UserError

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("norm.cpp", "adamw.cpp", "winograd.cpp")
)
# No -ffast-math: a library linked with it makes the process flush subnormal numbers to zero.
_FLAGS = (
    "-O3", "-march=native", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno",
    "-fopenmp", "-std=gnu++17", "-shared", "-fPIC",
)  # fmt: skip


class _Pointer:
    """The ctypes type of a pointer to a dense tensor on the CPU."""

    def __init__(self, dtype: torch.dtype, optional: bool = False):
        """Accept tensors of one dtype, and None as a null pointer if `optional`."""
        self.dtype, self.optional = dtype, optional

    def from_param(self, value: object) -> ctypes.c_void_p:
        """Return a tensor's address; raise TypeError for a wrong type, dtype, device or layout."""
        if value is None and self.optional:
            return ctypes.c_void_p(None)
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a tensor of {self.dtype}, got {type(value).__name__}")
        if value.dtype != self.dtype or not value.is_cpu:
            raise TypeError(f"expected {self.dtype} on cpu, got {value.dtype} on {value.device}")
        if not (value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)):
            raise TypeError(f"expected a dense tensor, got strides {value.stride()}")
        return ctypes.c_void_p(value.data_ptr())


_LONG, _FLOAT = ctypes.c_long, ctypes.c_float
_FLOATS, _MAYBE_FLOATS = _Pointer(torch.float32), _Pointer(torch.float32, optional=True)
# Also for lists of tensors, which are passed as their int64 addresses.
_LONGS, _MAYBE_LONGS = _Pointer(torch.int64), _Pointer(torch.int64, optional=True)
_NORM_ACT = (
    *[_LONG] * 4, _FLOATS, _MAYBE_FLOATS, _FLOATS, _FLOATS, *[_MAYBE_FLOATS] * 2,
    *[_MAYBE_LONGS] * 3, *[_LONG] * 3, _FLOAT, _LONG,
)  # fmt: skip

# Argument types of each kernel, as in the C++ sources. Without them ctypes infers types from the
# values, and would pass a Python int for a C float as an integer.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "norm_act": (*_NORM_ACT, _FLOAT, *[_FLOATS] * 3),
    "norm_act_backward": (*_NORM_ACT, *[_FLOATS] * 7),
    "gradient_norm": (_LONG, _LONGS, _LONGS, _FLOATS),
    "adamw": (_LONG, *[_LONGS] * 5, _MAYBE_LONGS, _FLOATS, *[_FLOAT] * 5),
    "work_size": (_LONG, _LONG),
    "transform_weight": (_LONG, _LONG, _FLOATS, _MAYBE_FLOATS, _MAYBE_FLOATS),
    "convolve": (*[_LONG] * 5, *[_FLOATS] * 4),
    "gradient_of_image": (*[_LONG] * 5, *[_FLOATS] * 3),
    "gradient_of_weight": (*[_LONG] * 5, *[_FLOATS] * 5),
}
_RESULTS = {"work_size": _LONG}  # result types; the other kernels return nothing


def supports(*tensors: Tensor) -> bool:
    """Return whether the kernels can run on these tensors; warn once if they cannot be compiled."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def available() -> bool:
    """Return whether the kernels are compiled."""
    return library() is not None


# torch.compile must evaluate this at trace time rather than trace it. The attribute is what
# torch.compiler.assume_constant_result sets, without importing the compiler.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(name: str, *args: int | float | Tensor | None) -> Any:
    """Call a kernel and return its result; raise TypeError or ArgumentError for wrong types."""
    loaded = library()
    assert loaded is not None, "no compiled kernels: check native.available() before calling"
    expected = len(SIGNATURES[name])
    if len(args) != expected:  # ctypes accepts surplus arguments
        raise TypeError(f"{name} takes {expected} arguments, got {len(args)}")
    return getattr(loaded, name)(*args)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the library, compiling it if needed; on failure warn once and return None."""
    try:
        return _load()
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        warnings.warn(
            "convolutions and normalizations are torch's own, because the faster ones in C++ "
            f"{_reason_and_remedy(error)}",
            stacklevel=1,
        )
        return None


def _reason_and_remedy(error: UserError | OSError | subprocess.CalledProcessError) -> str:
    """Return why there are no compiled kernels, and the remedy."""
    if isinstance(error, UserError):
        return f"could not be kept ({error})"
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in str(error.stderr).splitlines() if line.strip()]
        # The first line may only name a function.
        reason = next((line for line in lines if "rror" in line), (lines or [str(error)])[0])
        if "temporary file" in str(error.stderr) or "No space left" in str(error.stderr):
            return f"could not be compiled ({reason}): set TMPDIR to another folder, or free space"
        return f"could not be compiled ({reason}): install a newer g++, or set CXX to a compiler"
    compiler = os.environ.get("CXX", "g++")
    if error.filename == compiler:
        return (
            f"could not be compiled ({compiler}: {error.strerror}): install g++, or set CXX to a "
            "compiler"
        )
    if error.errno is None:  # from the loader, for instance on a disk mounted noexec
        return f"could not be loaded ({error}): set XDG_CACHE_HOME to a folder on another disk"
    return (
        f"could not be kept, as the cache folder {cache_root()} cannot be written "
        f"({error.strerror}): make it writable, or set XDG_CACHE_HOME to another"
    )


def _load() -> ctypes.CDLL:
    home = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu",
        "-lc10",
    ]  # fmt: skip
    command = [compiler, *_FLAGS, *map(str, _SOURCES), *libraries]
    # Named after the sources' contents, not their path: jobs run copies of them.
    parts = [compiler, *_FLAGS, *libraries, torch.__version__, _processor()]
    parts += [path.read_text(encoding="utf-8") for path in _SOURCES]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    path = cache_root() / f"kernels-{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
            os.replace(built, path)  # atomic, since several processes may compile at once
    loaded = ctypes.CDLL(str(path))
    for kernel_name, types in SIGNATURES.items():
        kernel = getattr(loaded, kernel_name)
        kernel.argtypes, kernel.restype = types, _RESULTS.get(kernel_name)
    return loaded


def _processor() -> str:
    """Return a description of the processor: different nodes of a cluster may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))
