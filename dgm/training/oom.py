"""Out of memory: recognize the error, and find the largest micro-batch that fits."""

from __future__ import annotations

import gc
import re

import torch

from dgm.common.errors import UserError
from dgm.objective import Nets, WholeBatch
from dgm.training.job import Job
from dgm.training.sampler import BatchSampler, trial_batch

_ON_CPU = r"can't allocate memory|not enough memory|std::bad_alloc"
# Errors that are not torch.OutOfMemoryError, since it was not torch that allocated the memory.
_ON_GPU = (
    r"CUDA (driver )?error: out of memory",  # torch, outside of its allocator
    r"CUDA (ran )?out of memory",  # torch 2.15, kernels that cuDNN compiles; re-raised errors
    r"(CUBLAS|CUSOLVER|CUDNN)_STATUS_(\w+_)?ALLOC(ATION)?_FAILED",
    r"Triton Error \[CUDA\]: out of memory",
    r"Cuda failure (\d+ )?'out of memory'",  # NCCL
)
_OUT_OF_MEMORY = re.compile("|".join((_ON_CPU, *_ON_GPU)))
_ONEDNN = "could not create a primitive"  # oneDNN, without memory for its generated code


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is an allocation that failed, on a GPU or not."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    reason = str(error)
    return (
        isinstance(error, kinds) or reason == _ONEDNN or _OUT_OF_MEMORY.search(reason) is not None
    )


class MemoryGuard:
    """Suppress the error of an allocation that fails in a block, and set `exceeded`."""

    exceeded = False

    def __enter__(self) -> MemoryGuard:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.exceeded = isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error)
        return self.exceeded


def advise(job: Job, batches: BatchSampler) -> UserError:
    """Return an error that names the largest micro-batch that fits, found by trying.

    Call it outside of any `except` block: a handled exception keeps the step's tensors alive.
    """
    tried, per_rank = batches.micro_batch, batches.images_per_rank
    reason = f"{tried} images at a time do not fit into the memory of {job.engine.device}"
    if isinstance(job.objective, WholeBatch) and job.objective.whole_batch:
        return UserError(f"{reason}: lower train.global_batch, or use more processes")
    if job.engine.launch.zero is not None:  # a trial would need all processes
        return UserError(f"{reason}: lower train.micro_batch, which changes no result")
    sizes = (n for n in range(min(tried, per_rank + 1) - 1, 0, -1) if per_rank % n == 0)
    nets = job.engine.copy_nets()
    largest = next((n for n in sizes if _batch_fits(job, nets, n)), None)
    if largest is None:
        return UserError(f"{reason}, nor do fewer: choose a smaller model, or another machine")
    return UserError(
        f"{reason}: set train.micro_batch {largest}, the largest that was seen to fit, which "
        "changes no result (train.activation_checkpointing makes room for more)"
    )


def _batch_fits(job: Job, nets: Nets, count: int) -> bool:
    """Return whether forward and backward passes of every phase fit with `count` images."""
    gc.collect()
    if job.engine.device.type == "cuda":
        torch.cuda.empty_cache()
    with MemoryGuard() as memory:
        batch, draws = trial_batch(count, job.image_shape, job.engine.device)
        for phase in job.objective.phases:
            nets[phase.net].requires_grad_(True)
            with job.engine.autocast():
                loss = job.objective.loss(nets, batch, phase, draws)["loss"]
            loss.backward()
            nets[phase.net].requires_grad_(False)
    return not memory.exceeded
