"""Steps in this process: none waits for the GPU, and a batch that is too large is reported."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from dgm.benchmarks.loops import make_trainer
from dgm.common.errors import UserError
from dgm.training.cuda_graph import WARM_UP
from tests.gpu.checks.registry import Context, Group

GROUP = Group()


def options(context: Context, *more: str) -> list[str]:
    """Return the options of a run in an empty folder."""
    folder = context.scratch / "step"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [f"--run.dir={folder}", f"--data.shards={context.shards}", "--run.trackers=[]"]
    return [*words, "--train.log_every_images=1000000000", *more]


@GROUP.check("no step waits for the GPU", 150, quick=True, needs_gpu=True)
def no_step_waits(context: Context) -> str:
    """Torch's sync debug mode raises an error where the host would wait."""
    modes = ("none", "auto", "graphs")
    for mode in modes:
        trainer, _ = make_trainer("ddpm_tiny.yaml", options(context, f"--train.compile={mode}"))
        trainer.start_logging()
        for step in range(WARM_UP + 3):
            if step == WARM_UP + 2:  # after compiling, capturing, and the last allocation
                torch.cuda.set_sync_debug_mode("error")
            try:
                trainer.train_step()
                trainer.after_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        trainer.engine.close()
    return ", ".join(modes)


@contextlib.contextmanager
def little_memory(context: Context) -> Iterator[None]:
    """Limit this process to little more memory than it uses already."""
    if context.gpu:
        torch.cuda.set_per_process_memory_fraction(0.03)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Several times the 256 MiB by which malloc grows (M_TOP_PAD in process_settings.py).
    limit = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@GROUP.check("a batch that does not fit is reported with a size that does", 100, quick=True)
def memory_is_named(context: Context) -> str:
    """The message names train.micro_batch and a size that was tried."""
    too_many = 262_144 if context.gpu else 16_384
    words = options(context, f"--train.global_batch={too_many}")
    trainer, folder = make_trainer("ddpm_tiny.yaml", words)
    with little_memory(context):
        try:
            trainer.train(folder)
        except UserError as error:
            assert "train.micro_batch" in str(error), str(error)
            return str(error)
    raise AssertionError(f"{too_many} images fitted")
