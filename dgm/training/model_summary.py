"""The summary that a run prints before it starts: parameters, FLOPs, engine, memory."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dgm.common.errors import UserError
from dgm.nn.kernels.precompile import Launches, collect_on
from dgm.training.engine import Engine
from dgm.training.job import Job, compile_mode
from dgm.training.launch_env import Launch
from dgm.training.sampler import trial_batch

_TRIAL = 2  # images of the trial run; one would be too few for a BatchNorm


def print_summary(job: Job, nets: dict[str, nn.Module], micro_batch: int, images_seen: int) -> None:
    """Print the run's data, model, engine, length and memory, and keys changed since last time."""
    total = job.config.total_images
    lines = {"data": job.data_line} if job.data_line else {}
    if images_seen >= total:
        lines["already seen"] = (
            f"{images_seen:,} of {total:,} images: the run is finished; to train longer, raise "
            "train.total_images"
        )
    else:
        lines |= _describe(job, nets, micro_batch)
        if (what := compile_mode(job.config)) != "none":
            lines["compile"] = f"{what}, which makes the first steps slow"
        lines["length"] = _length(total, job.config.global_batch) + _cadences(job)
        if images_seen:
            lines["continues at"] = f"{images_seen:,} images"
    for name, text in lines.items():
        print(f"{name + ':':17}{text}")
    for key, (before, now) in job.changed.items():
        print(f"{'changed:':17}{key} from {before} to {now}")


def _describe(job: Job, nets: dict[str, nn.Module], micro_batch: int) -> dict[str, str]:
    engine = job.engine
    flops, saved = _measure_cost(job, nets)
    return {
        "parameters": _sizes(nets),
        "GFLOP per image": f"{flops / 1e9:.2f} forward, {3 * flops / 1e9:.2f} with backward",
        "engine": str(engine.launch),
        "device": _device(engine.device),
        "precision": _precision(engine, nets),
        "expected memory": _memory(engine, nets, saved * micro_batch),
    }


def _memory(engine: Engine, nets: dict[str, nn.Module], activations: float) -> str:
    """Estimate the peak that the log reports as memory/peak_gib.

    activations: bytes kept for the backward pass of a micro-batch.
    """
    weights = sum(p.numel() * p.element_size() for n in nets.values() for p in n.parameters())
    if engine.device.type == "cuda":
        held = weights * weight_copies(engine.launch)
        return f"{(held + activations) / 2**30:.2f} GiB of GPU memory per process, plus CUDA's own"
    # The current size includes the weights, their average, and all libraries.
    held = psutil.Process().memory_info().rss + weights * (weight_copies(engine.launch) - 2)
    return f"about {(held + activations) / 2**30:.2f} GiB per process"


def _length(total: int, batch: int) -> str:
    whole = -(-total // batch) * batch
    steps = "" if whole == total else f", rounded up to {whole:,} by steps of {batch:,}"
    return f"{total:,} images{steps}"


def _cadences(job: Job) -> str:
    every = {**job.config.cadences, "evaluation": job.eval_every_images}
    listed = [
        f"{name} every {count:,}" for name, count in every.items()
        if 0 < count < job.config.total_images
    ]  # fmt: skip
    return f"; {', '.join(listed)}" if listed else ""


def weight_copies(launch: Launch) -> float:
    """Return a process's memory without activations, as a multiple of the size of the weights.

    Offloaded tensors do not count.
    """
    zero, fraction = launch.zero, 1 / launch.processes
    if zero is None or zero.stage == 0:
        return 5  # weights, gradient, two moments and the average
    moments = 3 * fraction * (not zero.offload_optimizer)  # with the fp32 weights
    gradient = 1 if zero.stage == 1 else fraction
    weights = 1 if zero.stage < 3 else fraction * (not zero.offload_weights)
    return moments + gradient + weights + 1


def _measure_cost(job: Job, nets: dict[str, nn.Module]) -> tuple[float, float]:
    """Return forward FLOPs (sum over phases) and bytes saved for backward (maximum), per image.

    Compute the loss once on two images, with `nets`, which are copies, and compile its kernels.
    """
    engine = job.engine
    batch, draws = trial_batch(_TRIAL, job.image_shape, engine.device)
    flops, max_bytes = 0.0, 0.0
    for phase in job.objective.phases:
        nets[phase.net].requires_grad_(True)
        saved = _SavedBytes(nets)
        counter = FlopCounterMode(display=False)
        with (
            torch.compiler.set_stance("force_eager"),
            engine.autocast(),
            collect_on(engine.device) as kernels,
        ):
            with counter, torch.autograd.graph.saved_tensors_hooks(saved.add, lambda x: x):
                job.objective.loss(nets, batch, phase, draws)
        _compile(kernels)
        nets[phase.net].requires_grad_(False)
        flops += counter.get_total_flops() / _TRIAL
        max_bytes = max(max_bytes, saved.bytes / _TRIAL)
    return flops, max_bytes


def _compile(kernels: Launches) -> None:
    try:
        kernels.compile()
    except Exception as error:  # of Triton, its compilers, or its cache folder
        lines = str(error).strip().splitlines()
        raise UserError(
            "our Triton kernels cannot be compiled on this machine "
            f"({type(error).__name__}: {lines[-1] if lines else 'no message'}): set train.kernels "
            "false, or install gcc and Python's headers and set TRITON_CACHE_DIR to a writable "
            "folder"
        ) from error


class _SavedBytes:
    """Counts the bytes that autograd saves, each storage once, without weights."""

    def __init__(self, nets: Mapping[str, nn.Module]):
        self.seen = {p.untyped_storage().data_ptr() for n in nets.values() for p in n.parameters()}
        self.held: list[Tensor] = []  # keeps addresses from being reused
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _sizes(nets: Mapping[str, nn.Module]) -> str:
    """Return parameter counts of the nets; of a single net with two or three parts, also theirs."""
    sizes = ", ".join(_size(name, net) for name, net in nets.items())
    parts = dict(next(iter(nets.values())).named_children())
    if len(nets) > 1 or len(parts) not in (2, 3):
        return sizes
    return f"{sizes} ({', '.join(_size(name, part) for name, part in parts.items())})"


def _size(name: str, net: nn.Module) -> str:
    return f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"


def _precision(engine: Engine, nets: dict[str, nn.Module]) -> str:
    weights = next(p.dtype for n in nets.values() for p in n.parameters())
    name = str(weights).removeprefix("torch.")
    return name if engine.precision == "no" else f"{engine.precision} autocast, {name} weights"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads per process"
