"""Steps in this process: none waits for the GPU, and too large a batch is named."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dgm.common.errors import UserError
from dgm.training.cuda_graph import WARM_UP
from tests.gpu.checks.registry import Context, Group

GROUP = Group()
TOO_MANY = 262_144  # images of a batch


def make_trainer(context: Context, *options: str) -> tuple[Any, Any]:
    """Return a trainer and its run folder."""
    from dgm.cli.assemble import make_job
    from dgm.cli.parser import parse
    from dgm.cli.start_engine import start_engine
    from dgm.cli.train_ddpm import Config, make_parts
    from dgm.training.run_folder import RunFolder
    from dgm.training.trainer import Trainer
    from shards.reader import open_shards

    folder = context.scratch / "step"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [f"--run.dir={folder}", f"--data.shards={context.shards}"]
    words += ["--run.trackers=[]", "--train.log_every_images=1000000000", *options]
    config: Any = parse(Config, "ddpm_tiny.yaml", words)
    engine, images = start_engine(config.train.mixed_precision), open_shards(str(context.shards))
    parts = make_parts(config, images.image_shape, images.num_classes)
    return Trainer(make_job(config, engine, images, parts)), RunFolder(config, folder)


@GROUP.check("no step waits for the GPU", 150, needs_gpu=True)
def no_step_waits(context: Context) -> str:
    """In torch's mode that raises where the host would wait."""
    ways = ("none", "auto", "graphs")
    for compiling in ways:
        trainer, _ = make_trainer(context, f"--train.compile={compiling}")
        trainer.start_logging()
        for _ in range(WARM_UP + 2):  # compiles, records, and allocates what is allocated once
            trainer.train_step()
            trainer.after_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
            trainer.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.engine.close()
    return ", ".join(ways)


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
    limit = pages * resource.getpagesize() + 600 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@GROUP.check("a batch that does not fit is answered with one that does", 100)
def memory_is_named(context: Context) -> str:
    """The message names train.micro_batch and a size that was tried."""
    trainer, folder = make_trainer(context, f"--train.global_batch={TOO_MANY}")
    with little_memory(context):
        try:
            trainer.train(folder)
        except UserError as error:
            assert "train.micro_batch" in str(error), str(error)
            return str(error)
    raise AssertionError(f"{TOO_MANY} images fitted")
