"""Reading images: our reader and stock webdataset on the same tars."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgm.benchmarks.machine import medians, print_table
from dgm.benchmarks.processes import ROOT
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from shards.reader import Shards

READER_IMAGES = 100_000  # per repetition
WEBLOADER_BATCHES = 40  # per repetition; READER_IMAGES would take WebDataset long
MAX_IMAGES = 1_000_000  # written before the measurement: 5 GB

FIRST_BATCH = """
import sys
import numpy as np
from shards.reader import Shards
shards = Shards(sys.argv[1])
index = np.random.default_rng(0).permutation(len(shards))[: int(sys.argv[2])]
images, labels = shards.images(index), shards.labels(index)
print(images.shape, labels.shape, flush=True)
"""
FIRST_WEBLOADER_BATCH = """
import sys
import webdataset
data = webdataset.WebDataset(sys.argv[1], shardshuffle=False).shuffle(1000).decode()
data = data.to_tuple("npy", "cls").batched(int(sys.argv[2]))
images, labels = next(iter(webdataset.WebLoader(data, batch_size=None, num_workers=0)))
print(images.shape, labels.shape, flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add = parser.add_argument
    add("--shards", type=Path, help="folder of shards; default: random images")
    add("--num-images", type=int, default=50_000, help="random images, without --shards")
    add("--batch", type=int, default=128, help="images per batch")
    add("--repetitions", type=int, default=5, help="repetitions of each measurement")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compare our reader with webdataset.WebLoader on the same tars and batch size."""
    check_range(args, "--", "batch", "repetitions", min=1)
    check_range(args, "--", "num-images", min=1, max=MAX_IMAGES)
    count, images = args.num_images, f"--num-images {args.num_images}"
    if args.shards is not None:
        count = len(Shards(args.shards))
        images = f"the {count} images of {args.shards}"
    if count < args.batch:
        raise UserError(f"--batch {args.batch} is more than {images}: lower it")
    with _shard_folder(args.shards, args.num_images) as folder:
        shards = Shards(folder)
        tars = [str(shards.folder / shard.name) for shard in shards.index.shards]
        times = args.repetitions
        ours = _reader_batches(shards, args.batch)
        rates = {"shards.reader": _rates(ours, READER_IMAGES // args.batch + 1, times)}
        for workers in (0, 2):
            theirs = _webloader_batches(tars, args.batch, workers)
            rates[f"webdataset.WebLoader, {workers} workers"] = _rates(
                theirs, WEBLOADER_BATCHES, times
            )
        sizes = args.batch, times
        first, webloader = (FIRST_BATCH, folder), (FIRST_WEBLOADER_BATCH, Path(tars[0]))
        starts = {
            "shards.reader, tars cached": _start_seconds(*first, *sizes),
            "shards.reader, tars not cached": _start_seconds(*first, *sizes, dropped=tars),
            "webdataset.WebLoader, tars cached": _start_seconds(*webloader, *sizes),
        }
    ours_rate, *others = medians(rates).values()
    ratio = ours_rate / max(others)
    print(f"{count} images in {len(tars)} tar(s), batch {args.batch}, {times} repetitions")
    print_table("images/s", rates, ",.0f")
    print(f"shards.reader / best WebLoader: {ratio:.0f}x")
    print_table("s from process start to first batch", starts, ".3f")
    return {"images_per_s": rates, "ratio": ratio, "first_batch_s": starts}


@contextmanager
def _shard_folder(folder: Path | None, num_images: int) -> Iterator[Path]:
    """Yield the given folder, or a temporary one with random 32 x 32 images in one tar."""
    if folder is not None:
        yield folder
        return
    from shards.sources import Source
    from shards.write import write_folder

    def samples() -> Iterator[tuple[np.ndarray, int]]:
        rng = np.random.default_rng(0)
        for number in range(num_images):
            yield rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), number % 10

    source = Source("random", tuple("0123456789"), (32, 32, 3), num_images, samples)
    with tempfile.TemporaryDirectory() as name:
        write_folder(source, Path(name), "train", shard_size=num_images)
        yield Path(name)


def _rates(batches: Iterator[Any], count: int, repetitions: int) -> list[float]:
    """Return images/s of turns of `count` batches, after one that warms up."""
    rates = []
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        images = sum(len(next(batches)[0]) for _ in range(count))
        rates.append(images / (time.perf_counter() - start))
    return rates[1:]


def _reader_batches(shards: Shards, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of shuffled epochs; the time includes drawing the order of each."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(shards))
        for first in range(0, len(order) - batch + 1, batch):
            index = order[first : first + batch]
            yield torch.from_numpy(shards.images(index)), torch.from_numpy(shards.labels(index))


def _webloader_batches(tars: list[str], batch: int, workers: int) -> Iterator[Any]:
    """Return batches of stock WebDataset, shuffled with its buffer."""
    import webdataset

    # Every worker gets all tars: one tar would leave all workers but one idle.
    urls = [tar for tar in tars for _ in range(max(1, workers))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).repeat().shuffle(1000).decode()
    dataset = dataset.to_tuple("npy", "cls").batched(batch)
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def _start_seconds(
    code: str, path: Path, batch: int, repetitions: int, dropped: Sequence[str] = ()
) -> list[float]:
    """Return seconds from the start of a Python process to its first batch, for several processes.

    dropped: files to drop from the page cache before each start.
    """
    command = [sys.executable, "-c", code, str(path.resolve()), str(batch)]
    seconds = []
    for _ in range(repetitions):
        for name in dropped:
            with open(name, "rb") as file:
                os.fsync(file.fileno())  # only clean pages can be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds.append(time.perf_counter() - start)
        assert process.returncode == 0 and line, f"no batch from {command[0]} -c"
    return seconds
