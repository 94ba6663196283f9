"""What to say where a batch does not fit into memory: the largest that was seen to fit."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from dgm.common.errors import UserError
from dgm.objective import Batch, Nets, Objective, WholeBatch
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.sampler import Batches

Result = TypeVar("Result")

_ON_CPU = r"can't allocate memory|not enough memory|std::bad_alloc"
# Errors that are not torch.OutOfMemoryError, since it was not torch that allocated the memory.
_ON_GPU = (
    r"CUDA (driver )?error: out of memory",  # torch beside its allocator
    r"CUDA (ran )?out of memory",  # torch 2.15 of what cuDNN compiles; and what is raised anew
    r"(CUBLAS|CUSOLVER|CUDNN)_STATUS_(\w+_)?ALLOC(ATION)?_FAILED",
    r"Triton Error \[CUDA\]: out of memory",
    r"Cuda failure (\d+ )?'out of memory'",  # NCCL
)
_LACK = re.compile("|".join((_ON_CPU, *_ON_GPU)))
_ONEDNN = "could not create a primitive"  # all that it says where it finds no memory for its code


def fitting(
    step: Callable[[], Result],
    engine: Engine,
    objective: Objective,
    batches: Batches,
    image_shape: tuple[int, ...],
) -> Result:
    """Take a step; raises UserError naming the largest micro-batch that fits, if not all."""
    try:
        return step()
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
    # Only here has the error let go of what the failed step held.
    raise _does_not_fit(engine, objective, batches, image_shape)


def is_lack_of_memory(error: BaseException) -> bool:
    """Say whether an error is of an allocation that failed, on a GPU or not."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    reason = str(error)
    return isinstance(error, kinds) or reason == _ONEDNN or _LACK.search(reason) is not None


def _does_not_fit(
    engine: Engine, objective: Objective, batches: Batches, image_shape: tuple[int, ...]
) -> UserError:
    tried, share = batches.micro_batch, batches.share
    reason = f"{tried} images at a time do not fit into the memory of {engine.device}"
    if isinstance(objective, WholeBatch) and objective.whole_batch:
        return UserError(f"{reason}: lower train.global_batch, or take more processes")
    if engine.asked.zero is not None:  # a trial would need all processes
        return UserError(f"{reason}: lower train.micro_batch, which changes no result")
    sizes = (n for n in range(min(tried, share + 1) - 1, 0, -1) if share % n == 0)
    nets = engine.copies()
    fits = next((n for n in sizes if _fits(engine, objective, nets, image_shape, n)), None)
    if fits is None:
        return UserError(f"{reason}, nor fewer: choose a smaller model, or another machine")
    return UserError(
        f"{reason}: set train.micro_batch {fits}, the largest that was seen to fit, which changes "
        "no result (train.activation_checkpointing makes room for more)"
    )


def _fits(
    engine: Engine, objective: Objective, nets: Nets, image_shape: tuple[int, ...], count: int
) -> bool:
    """Try one step of every phase with so many images, but for the update."""
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    images = torch.zeros((count, *image_shape), dtype=torch.uint8, device=engine.device)
    batch = Batch(images, torch.zeros(count, dtype=torch.int64, device=engine.device))
    index = torch.arange(count, device=engine.device)
    draws = Draws.of(0, index, index)
    try:
        for phase in objective.phases:
            nets[phase.net].requires_grad_(True)
            with engine.autocast():
                loss = objective.loss(nets, batch, phase, draws)["loss"]
            loss.backward()
            nets[phase.net].requires_grad_(False)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        return False
    return True
