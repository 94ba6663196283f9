"""Process-wide settings of the device: which algorithms it may choose, and how it rounds fp32."""

from __future__ import annotations

import os
import sys
import warnings

import torch

from dgm.common.errors import UserError
from dgm.training.launch_env import on_gpu

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")  # all that torch takes for deterministic products
_INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"


def apply_device_settings(deterministic: bool = False, tf32: bool = False) -> None:
    """Set algorithms and precision of all that this process computes from now on.

    Call it before the process makes a CUDA context: cuBLAS reads its variable as that is made.
    Raises UserError where the environment asks cuBLAS for a workspace that is not reproducible.
    """
    if deterministic:
        _reproducible_products()
    _set_algorithms(deterministic)
    _set_precision(tf32)


def _reproducible_products() -> None:
    """Set cuBLAS's workspace to a fixed size, without which products may be summed differently."""
    found = os.environ.setdefault(_CUBLAS, _REPRODUCIBLE_WORKSPACES[0])
    if found not in _REPRODUCIBLE_WORKSPACES:
        raise UserError(
            f"train.deterministic is true, but {_CUBLAS} is {found!r}, with which matrix products "
            f"are not reproducible: unset it, or set it to {' or '.join(_REPRODUCIBLE_WORKSPACES)}"
        )


def _set_algorithms(deterministic: bool) -> None:
    # What torch.use_deterministic_algorithms does, except that it imports the compiler to set
    # this flag of it, which takes two seconds and is of no use where nothing is compiled.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    if deterministic:
        os.environ[_INDUCTOR] = "1"  # read as the compiler is imported, by its workers too
        inductor = sys.modules.get("torch._inductor.config")
        if inductor is not None:
            inductor.deterministic = True  # type: ignore[attr-defined]
    # Filling fresh tensors with NaN costs time and finds faults only: all of them are written to.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    # Measuring which convolution is fastest pays as shapes do not change; its choice may differ
    # from one process to the next.
    torch.backends.cudnn.benchmark = on_gpu() and not deterministic


def _set_precision(tf32: bool) -> None:
    # Torch's default is TF32 for convolutions only. These names are the older ones: libraries
    # still read them, which raises once the newer `fp32_precision` was set (torch 2.11 and 2.15),
    # whereas the newer ones can be read after these were set.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # The compiler recommends TF32, which is train.tf32's to decide.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
