"""Kernels in C++ for the CPU: compiled where they first run, then kept in the user's cache."""

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

import torch
from torch import Tensor

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("norm.cpp", "update.cpp", "winograd.cpp")
)
# No -ffast-math: loading what was linked with it would change how this process rounds elsewhere.
_FLAGS = (
    "-O3", "-march=native", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno",
    "-fopenmp", "-std=gnu++17", "-shared", "-fPIC",
)  # fmt: skip


def serves(*tensors: Tensor) -> bool:
    """Say whether kernels here can take these tensors; warns once where none can be compiled."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and available()
    )


def available() -> bool:
    """Return whether the kernels could be compiled."""
    return library() is not None


# A constant to torch.compile, which otherwise would trace what loads the library. As
# torch.compiler.assume_constant_result does it, without importing the compiler.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(name: str, *given: int | float | Tensor | None) -> int:
    """Call a kernel; C++ knows whole numbers as long, others as float, and no tensor as null."""
    found = library()
    assert found is not None, "who calls has asked before"
    kernel = getattr(found, name)
    kernel.restype = ctypes.c_long
    result: int = kernel(*map(_word, given))
    return result


def _word(part: int | float | Tensor | None) -> ctypes._SimpleCData:
    if isinstance(part, Tensor):
        return ctypes.c_void_p(part.data_ptr())
    if isinstance(part, float):
        return ctypes.c_float(part)
    return ctypes.c_void_p(None) if part is None else ctypes.c_long(part)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the compiled code, compiled anew where it has changed; warns once where it cannot be."""
    try:
        return _load()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "convolutions and normalisations are torch's own, as those in C++ could not be "
            f"compiled ({str(said).strip().splitlines()[0]}): install g++ for faster ones",
            stacklevel=1,
        )
        return None


def _load() -> ctypes.CDLL:
    home = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch_cpu",
        "-lc10",
    ]  # fmt: skip
    command = [compiler, *_FLAGS, *map(str, _SOURCES), *libraries]
    # Not where the sources lie: jobs run copies of them.
    told = [compiler, *_FLAGS, *libraries, torch.__version__, _processor()]
    told += [path.read_text() for path in _SOURCES]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    path = _cache() / f"kernels-{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
            os.replace(made, path)  # several processes may be at it: the last one wins
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """Describe this machine's processor: on a cluster nodes share a cache, but are not alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgm"
