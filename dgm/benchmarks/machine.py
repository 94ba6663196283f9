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
from torch import Tensor
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
    images = 32 if device().type == "cpu" else 1024
    layout = torch.channels_last
    x = torch.randn(images, 128, 16, 16, device=device(), dtype=dtype).to(memory_format=layout)
    weight = torch.randn(128, 128, 3, 3, device=device(), dtype=dtype).to(memory_format=layout)
    products: list[tuple[int, Callable[[], Tensor]]] = [
        (2 * side**3, lambda: a @ a),
        (2 * images * 14 * 14 * 128 * 128 * 9, lambda: functional.conv2d(x, weight)),
    ]
    return max(count / _best_s(multiply) / 1e9 for count, multiply in products)


def memory_bandwidth() -> float:
    """Return GB/s of copying a block larger than any cache, counting bytes read and written."""
    source = torch.zeros(2**28 if torch.cuda.is_available() else 2**26, device=device())
    target = torch.empty_like(source)
    if torch.cuda.is_available():
        copies = [(source, target), (target, source)]
        seconds = min(
            time_launches(lambda pair: pair[1].copy_(pair[0]), copies, 8) for _ in range(3)
        )
    else:
        seconds = _best_s(lambda: target.copy_(source))
    return 2 * source.nbytes / seconds / 1e9


def cache_bytes() -> int:
    """Return the size of the GPU's last-level cache."""
    return int(torch.cuda.get_device_properties().L2_cache_size)


def time_in_turns(
    functions: Mapping[str, Callable[[int], Any]], repetitions: int, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the seconds of each call, and why functions failed, both by name.

    The functions take turns, so that load affects all of them alike; each is called with the number
    of the repetition. One that fails does not stop the others; raise its exception if
    all fail.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    failed: dict[str, str] = {}
    for repetition in range(warm_up + repetitions):
        for name in list(seconds):
            wait()
            start = time.perf_counter()
            try:
                functions[name](repetition)
                wait()
            except Exception as error:  # any: the others are still timed
                if len(seconds) == 1:
                    raise
                failed[name] = str(error).strip().splitlines()[0]
                del seconds[name]
                continue
            if repetition >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds, failed


def time_launches(work: Callable[[Input], Any], inputs: Sequence[Input], repetitions: int) -> float:
    """Return seconds of GPU time per call of `work`, by CUDA events around many calls.

    Calls cycle through `inputs`, and as many outputs as there are inputs are kept: otherwise the
    allocator would reuse the same memory, and outputs would stay in the cache. The first
    measurement includes allocating that memory.
    """
    kept: collections.deque[Any] = collections.deque(maxlen=len(inputs))
    for item in inputs[:2]:
        kept.append(work(item))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for number in range(repetitions):
        kept.append(work(inputs[number % len(inputs)]))
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repetitions


def _best_s(work: Callable[[], Tensor]) -> float:
    def work_and_wait() -> None:
        work()
        wait()

    return min(timeit.repeat(work_and_wait, wait, number=1, repeat=8))


def time_convolution(
    image: tuple[int, ...], kernel: tuple[int, ...], stride: Any, padding: Any, data_gradient: bool
) -> float:
    """Return the seconds of a convolution, forward and backward, the minimum of nine runs."""
    layout = torch.channels_last
    x = torch.randn(image).to(memory_format=layout).requires_grad_(data_gradient)
    weight = torch.randn(kernel).to(memory_format=layout).requires_grad_()
    bias = torch.zeros(kernel[0], requires_grad=True)
    inputs = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
    grad = torch.randn_like(functional.conv2d(x, weight, bias, stride, padding))

    def both_passes() -> None:
        y = functional.conv2d(x, weight, bias, stride, padding)
        torch.autograd.grad(y, inputs, grad)

    return min(timeit.repeat(both_passes, number=1, repeat=9))


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
