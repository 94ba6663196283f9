"""A batch that does not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_loop
import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.objective import Batch, Phase
from dgm.rng import Draws
from dgm.training.checkpoint import newest
from dgm.training.oom import is_out_of_memory


class Greedy(small_loop.TwoPhases):
    """Fails to allocate memory for more than `at_most` images."""

    whole_batch = False

    def __init__(self, at_most: int):
        super().__init__(small_loop.BOTH)
        self.at_most, self.trials = at_most, 2  # the summary calls it once per phase

    def loss(
        self, nets: Mapping[str, nn.Module], batch: Batch, phase: Phase, draws: Draws
    ) -> dict[str, Tensor]:
        if len(batch.images) > self.at_most and self.calls >= self.trials:
            torch.empty(2**50, dtype=torch.uint8)
        return super().loss(nets, batch, phase, draws)


def error_of(folder: Path, objective: Greedy, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        small_loop.train(small_loop.job(folder, objective, **changes))
    return str(caught.value)


@pytest.mark.slow
def test_largest_micro_batch_that_fits_is_named_and_trains(tmp_path: Path):
    message = error_of(tmp_path / "a", Greedy(5), global_batch=24, total_images=72)
    assert message.startswith("24 images at a time do not fit into the memory of cpu: ")
    assert "set train.micro_batch 4, the largest that was seen to fit" in message  # 24 = 6 * 4
    assert newest(tmp_path / "a" / "checkpoints") is None
    made = small_loop.job(tmp_path / "a", Greedy(5), global_batch=24, total_images=72)
    assert small_loop.train(replace(made, config=replace(made.config, micro_batch=4)))


def test_a_model_that_does_not_fit_is_reported(tmp_path: Path):
    assert "nor do fewer: choose a smaller model" in error_of(tmp_path / "a", Greedy(0))


def test_a_batch_that_cannot_be_split_has_to_be_smaller(tmp_path: Path):
    objective = Greedy(5)
    objective.whole_batch = True
    assert error_of(tmp_path / "a", objective).endswith(
        "lower train.global_batch, or use more processes"
    )


def test_other_errors_are_raised(tmp_path: Path):
    class Broken(Greedy):
        def loss(self, *given: Any) -> dict[str, Tensor]:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        small_loop.train(small_loop.job(tmp_path / "a", Broken(5)))


HINT = "\nSearch for `cudaErrorMemoryAllocation' in the CUDA documentation for more information."
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error "
    "(run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total"),
    torch.AcceleratorError(f"CUDA error: out of memory{HINT}"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate()`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("CUDA ran out of memory outside PyTorch's allocator. If this workload uses many"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    torch.distributed.DistBackendError(f"{NCCL}Cuda failure 2 'out of memory'"),
    torch.distributed.DistBackendError(f"{NCCL}Cuda failure 'out of memory'"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 1125899906842624 bytes."),
    RuntimeError("could not create a primitive"),
    MemoryError("Unable to allocate 1.00 PiB for an array"),
]  # fmt: skip
OTHERS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED"),
    RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448. "
                 "Reducing block sizes or `num_stages` may help."),
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    torch.distributed.DistBackendError(f"{NCCL}Cuda failure 1 'invalid argument'"),
    RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on "
                 "device (28)"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
]  # fmt: skip


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_an_allocation_that_failed_is_recognized(error: Exception):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_faults_are_not_out_of_memory(error: Exception):
    assert not is_out_of_memory(error)
