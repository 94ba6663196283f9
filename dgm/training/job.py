"""What a run is made of, and how long it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dgm.common.config_keys import MAY_CHANGE
from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.nn.compiling import compile_net
from dgm.nn.layers import recompute_activations, use_kernels
from dgm.objective import Nets, Objective, WholeBatch
from dgm.training.device_loader import Images
from dgm.training.engine import Engine
from dgm.training.launch_env import Launched, on_gpu
from dgm.training.optimizer import OptimConfig
from dgm.training.sampler import Batches
from dgm.training.watchdog import Watchdog

MOST_IMAGES = 2**20
"""Of a step: more fit into no memory, and are no use."""


@dataclass(frozen=True)
class Cadences:
    """Images between two logs, sample grids and checkpoints; 0: never."""

    log: int
    sample: int
    save: int


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; the defaults are DDPM's for CIFAR-10."""

    global_batch: int = 128
    """Images per step over all processes."""
    micro_batch: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images per forward pass of a process; less than its share accumulates gradients."""
    total_images: int = field(default=102_400_000, metadata=MAY_CHANGE)
    """Images seen at which the run is done, rounded up to whole steps."""
    log_every_images: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images between two lines of metrics.jsonl; null is a fiftieth of the run, 12,800 at most."""
    sample_every_images: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images between two sample grids; null is a third of the run, 1,280,000 at most; 0 makes none
    but the last."""
    save_every_images: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images between two checkpoints; null is a third of the run, 1,280,000 at most; 0 makes none
    but the last."""
    keep_checkpoints: int = field(default=3, metadata=MAY_CHANGE)
    """Newest checkpoints that are kept."""
    samples_per_class: int = field(default=10, metadata=MAY_CHANGE)
    """Columns of the sample grid, which has a row for each class."""
    ema_halflife_images: float = 887_000
    """Images after which a weight counts half in the moving average."""
    compile: Literal["auto", "graphs", "all", "noise", "none"] = field(
        default="auto", metadata=MAY_CHANGE
    )
    """What to compile: `none`; `noise`, the noising; `all`, the nets too; `graphs`, the same with
    CUDA graphs (of whole steps on one process, of the nets on several); `auto` is `all` on a GPU,
    else `noise`."""
    activation_checkpointing: bool = field(default=False, metadata=MAY_CHANGE)
    """Keep only what enters each block and compute the rest again in the backward pass: less
    memory, more time, the same bits."""
    images_on_device: bool | None = field(default=None, metadata=MAY_CHANGE)
    """Keep all images on the device; null does where they take a quarter of a GPU at most."""
    kernels: bool = field(default=True, metadata=MAY_CHANGE)
    """Use kernels of our own: for normalisation in nets; on a GPU for noising unless compile is
    none; on a CPU for 3x3 convolutions, which round by 1e-5 instead of 1e-6, and for AdamW."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast; auto is bf16 on a GPU that has it, else no."""
    tf32: bool = field(default=False, metadata=MAY_CHANGE)
    """On a GPU round the factors of fp32 convolutions and matrix products to TF32, of 10 bits:
    faster; without it fp32 is fp32."""
    deterministic: bool = field(default=False, metadata=MAY_CHANGE)
    """On a GPU take only algorithms that give the same bytes each time, on the same card with the
    same versions: slower; on a CPU runs are reproducible without it."""
    float64: bool = False
    """Train in double precision: slow, for comparing runs where rounding would hide a fault."""
    overfit_one_batch: bool = False
    """Debug: train on the first batch only; a sound model's loss then falls far."""
    profile_steps: int = field(default=0, metadata=MAY_CHANGE)
    """Debug: write a trace of so many steps to profile/, for Perfetto or TensorBoard."""
    threads: int | None = field(default=None, metadata=MAY_CHANGE)
    """Threads of a process on a CPU; null is OMP_NUM_THREADS where you set it, else its share of
    the machine's cores. Another number rounds differently."""
    timeout_minutes: float = field(default=30, metadata=MAY_CHANGE)
    """Minutes without a step, a save or any other progress after which a process that hangs is
    ended, with code 1 and a line that says in what; 0: never."""
    detect_anomaly: bool = field(default=False, metadata=MAY_CHANGE)
    """Debug: name the operation whose gradient is not finite; slow."""

    @property
    def cadences(self) -> Cadences:
        """Return how often to log, sample and save, in images."""

        def every(given: int | None, fraction: int, most: int) -> int:
            part = max(self.total_images // fraction, self.global_batch)
            return min(part, most) if given is None else given

        return Cadences(
            log=every(self.log_every_images, 50, 12_800),
            sample=every(self.sample_every_images, 3, 1_280_000),
            save=every(self.save_every_images, 3, 1_280_000),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Give the type of weights and images."""
        return torch.float64 if self.float64 else torch.float32


@dataclass
class Job:
    """Everything that a run is made of."""

    folder: Path
    seed: int
    config: TrainConfig
    optim: dict[str, OptimConfig]  # of each net
    engine: Engine
    objective: Objective
    nets: dict[str, nn.Module]
    data: Images
    data_id: str  # changes with the data's contents
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    settings: dict[str, Any]  # the whole configuration, flat, for trackers
    data_line: str = ""  # what the data are, for the screen; empty where nothing is to be printed
    changed: dict[str, list[Any]] = field(default_factory=dict)  # what differs from the run so far
    # Measures averaged weights as a run goes, every process taking part. By its first value, the
    # lower the better, the best checkpoint is kept.
    evaluation: Callable[[Nets], dict[str, float]] | None = None
    former_data_ids: tuple[str, ...] = ()  # which older versions gave to the same data
    eval_every_images: int = 0
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(0))


def what_to_compile(config: TrainConfig) -> Literal["graphs", "all", "noise", "none"]:
    """Say what to compile, with `auto` decided."""
    if config.compile == "auto":
        return "all" if on_gpu() else "noise"
    return config.compile


def records_steps(config: TrainConfig, asked: Launched) -> bool:
    """Return whether whole steps are recorded as CUDA graphs, which requires one process."""
    alone = asked.processes == 1 and asked.zero is None
    # Anomaly detection makes the host wait, which cannot be recorded.
    return config.compile == "graphs" and alone and not config.detect_anomaly


def noising_way(config: TrainConfig) -> Literal["eager", "compiled", "kernel"]:
    """Say how images are to be noised."""
    if what_to_compile(config) == "none":
        return "eager"
    return "kernel" if with_kernels(config) else "compiled"


def fit_out(nets: Nets, config: TrainConfig, asked: Launched, device: torch.device) -> None:
    """Give nets what makes them faster or smaller, as configured; raises UserError naming a key."""
    compiling = what_to_compile(config)
    fetched = asked.zero is not None and asked.zero.stage == 3  # weights, as a layer needs them
    for net in nets.values():
        if with_kernels(config):
            use_kernels(net, device)
        if compiling in ("all", "graphs") and not fetched:
            compile_net(net, graphs=compiling == "graphs" and not records_steps(config, asked))
    if config.activation_checkpointing and not sum(map(recompute_activations, nets.values())):
        raise UserError(
            "train.activation_checkpointing is true, but these nets have no blocks that can be "
            "computed again (BatchNorm and spectral norm count each pass): leave it out"
        )


def with_kernels(config: TrainConfig) -> bool:
    """Say whether kernels of our own are to serve; they know no double precision."""
    return config.kernels and not config.float64


def check(config: TrainConfig, asked: Launched) -> None:
    """Raise UserError where a setting makes no sense, or not with the engine that is asked for."""
    ones = ("total_images", "log_every_images", "keep_checkpoints")
    check_range(config, "train.", *ones, min=1)
    check_range(config, "train.", "global_batch", "micro_batch", min=1, max=MOST_IMAGES)
    check_range(config, "train.", "samples_per_class", min=1, max=1000)
    zeros = ("sample_every_images", "save_every_images", "ema_halflife_images", "profile_steps")
    check_range(config, "train.", *zeros, "timeout_minutes", min=0)
    if config.float64 and config.mixed_precision == "bf16":
        raise UserError("train.float64 and train.mixed_precision bf16 exclude each other: set one")
    if asked.zero is not None and config.float64:
        raise UserError("train.float64 is set, but ZeRO keeps fp32 weights: use one process or DDP")
    if config.compile == "graphs" and not on_gpu():
        raise UserError("train.compile is graphs, but there is no GPU here: choose auto or all")
    if asked.zero is not None and asked.zero.stage == 3 and config.compile in ("all", "graphs"):
        raise UserError(
            f"train.compile is {config.compile}, but ZeRO-3 fetches weights as a layer needs them, "
            "which cannot be compiled: choose auto or noise, or a lower zero_stage"
        )


def check_micro_batches(objective: Objective, batches: Batches) -> None:
    """Raise UserError where accumulating micro-batches would be another run."""
    whole = isinstance(objective, WholeBatch) and objective.whole_batch
    if whole and batches.num_micro > 1:
        raise UserError(
            f"train.micro_batch {batches.micro_batch} splits the {batches.share} images that a "
            "process takes, but BatchNorm lets images of a batch depend on each other: leave it "
            "out, or choose a model without BatchNorm"
        )
