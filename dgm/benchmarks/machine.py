"""Peak rates of this machine, timing of its device, and tables of results."""

from __future__ import annotations

import argparse
import collections
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from dgm.common.command_line import home_path
from dgm.common.validation import check_range

Input = TypeVar("Input")

MAX_BATCH = 65_536


def add_size_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    """Add the options for the sizes and the precision of DDPM's U-Net."""
    parser.add_argument("--channels", type=int, default=64, help="width of the first level")
    parser.add_argument("--batch", type=int, default=batch, help="images of each process")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")


def check_sizes(args: argparse.Namespace) -> None:
    """Raise UserError if the width or the batch is out of range."""
    check_range(args, "--", "channels", "batch", min=1, max=MAX_BATCH)


def add_shards_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for a folder of train shards."""
    parser.add_argument(
        "--shards", type=home_path, help="folder of train shards; default: the built-in shapes"
    )


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_peak(dtype: torch.dtype = torch.float32) -> float:
    """Return GFLOP/s of matrix products, by BLAS or as convolutions, whichever is faster."""
    side = 8192 if torch.cuda.is_available() else 2048
    a = torch.randn(side, side, device=device(), dtype=dtype)
    # A convolution is a matrix product too, and on some CPUs much faster.
    images = 1024 if torch.cuda.is_available() else 32
    layout = torch.channels_last
    x = torch.randn(images, 128, 16, 16, device=device(), dtype=dtype).to(memory_format=layout)
    weight = torch.randn(128, 128, 3, 3, device=device(), dtype=dtype).to(memory_format=layout)
    products: list[tuple[int, Callable[[], Any]]] = [
        (2 * side**3, lambda: a @ a),
        (2 * images * 14 * 14 * 128 * 128 * 9, lambda: functional.conv2d(x, weight)),
    ]
    return max(count / best_s(multiply) / 1e9 for count, multiply in products)


def memory_bandwidth() -> float:
    """Return GB/s of copying a block larger than any cache, counting bytes read and written."""
    source = torch.zeros(2**28 if torch.cuda.is_available() else 2**26, device=device())
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_s(lambda: target.copy_(source)) / 1e9


def time_calls(work: Callable[[Input], Any], inputs: Sequence[Input], repetitions: int) -> float:
    """Return seconds per call of `work`, of many calls without waiting for the GPU between them.

    Calls cycle through `inputs`, and as many outputs as there are inputs are kept: otherwise the
    allocator would reuse the same memory, and outputs would stay in the cache. The first
    measurement includes allocating that memory, and compiling.
    """
    kept: collections.deque[Any] = collections.deque(maxlen=len(inputs))
    wait()
    start = time.perf_counter()
    for number in range(repetitions):
        kept.append(work(inputs[number % len(inputs)]))
    wait()
    return (time.perf_counter() - start) / repetitions


def best_s(work: Callable[[], Any], repetitions: int = 8) -> float:
    """Return the seconds of the fastest call."""

    def work_and_wait() -> None:
        work()
        wait()

    return min(timeit.repeat(work_and_wait, wait, number=1, repeat=repetitions))


def gflop(net: nn.Module, device: torch.device, image_size: int = 32) -> float:
    """Return the GFLOP of a forward pass for one image; a multiply-add counts as two."""
    from torch.utils.flop_counter import FlopCounterMode  # imports the compiler

    x = torch.zeros(2, 3, image_size, image_size, device=device)
    # Eager: a compiled net would be compiled again for this batch.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            net(x, torch.zeros(2, dtype=torch.long, device=device))
    return counter.get_total_flops() / 2 / 1e9


def medians(results: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each row."""
    return {name: statistics.median(values) for name, values in results.items()}


def print_table(title: str, results: dict[str, list[float]], form: str) -> None:
    """Print median, minimum and maximum of each row; `form` formats a number."""
    rows = {
        n: (statistics.median(values), min(values), max(values)) for n, values in results.items()
    }
    print_rows(title, dict.fromkeys(("median", "min", "max"), form), rows)


def print_rows(title: str, columns: Mapping[str, str], rows: Mapping[str, Iterable[float]]) -> None:
    """Print a table; `columns` has the format of each column's numbers."""
    width = max(map(len, (title, *rows)))
    print(f"\n{title:{width}} " + " ".join(f"{head:>10}" for head in columns))
    for name, values in rows.items():
        cells = zip(values, columns.items(), strict=True)
        numbers = (f"{value:>{max(10, len(head))}{form}}" for value, (head, form) in cells)
        print(f"{name:{width}} " + " ".join(numbers))
