"""The parts of a run, and the `train` section of its configuration."""

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
from dgm.training.launch_env import Launch, on_gpu
from dgm.training.optimizer import OptimConfig
from dgm.training.sampler import BatchSampler
from dgm.training.watchdog import Watchdog

MAX_GLOBAL_BATCH = 2**20
"""Upper limit of images per step, more than any memory holds."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and settings of training; the defaults are DDPM's for CIFAR-10."""

    global_batch: int = 128
    """Images per step, over all processes."""
    micro_batch: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images per forward pass of a process; null takes its part of train.global_batch at once,
    a smaller number accumulates gradients."""
    total_images: int = field(default=102_400_000, metadata=MAY_CHANGE)
    """Images seen at which the run is done, rounded up to whole steps."""
    log_every_images: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images between two lines of metrics.jsonl; null is a fiftieth of the run, 12,800 at most."""
    sample_every_images: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images between two sample grids; null is a third of the run, 1,280,000 at most; 0 makes
    only the last."""
    save_every_images: int | None = field(default=None, metadata=MAY_CHANGE)
    """Images between two checkpoints; null is a third of the run, 1,280,000 at most; 0 makes
    only the last."""
    keep_checkpoints: int = field(default=3, metadata=MAY_CHANGE)
    """Number of newest checkpoints to keep."""
    samples_per_class: int = field(default=10, metadata=MAY_CHANGE)
    """Columns of the sample grid, which has one row per class."""
    ema_halflife_images: float = 887_000
    """Half-life of the moving average of the weights, in images."""
    compile: Literal["auto", "graphs", "all", "noise", "none"] = field(
        default="auto", metadata=MAY_CHANGE
    )
    """What to compile: `none`; `noise`, the noising; `all`, the nets too; `graphs`, the same with
    CUDA graphs (of whole steps on one process, of the nets on several); `auto` is `all` on a GPU,
    else `noise`."""
    activation_checkpointing: bool = field(default=False, metadata=MAY_CHANGE)
    """Keep only the input of each block and recompute the rest in the backward pass: less memory,
    more time, the same bits."""
    images_on_device: bool | None = field(default=None, metadata=MAY_CHANGE)
    """Keep all images on the device; null does so if they take at most a quarter of a GPU's
    free memory."""
    kernels: bool = field(default=True, metadata=MAY_CHANGE)
    """Use our own kernels: for normalization in nets; on a GPU for noising unless compile is
    none; on a CPU for 3x3 convolutions, with rounding errors of 1e-5 instead of 1e-6, and AdamW."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast; auto is bf16 on a GPU that supports it, else no."""
    tf32: bool = field(default=False, metadata=MAY_CHANGE)
    """On a GPU round the inputs of fp32 convolutions and matrix products to TF32 (10-bit mantissa):
    faster, less accurate."""
    deterministic: bool = field(default=False, metadata=MAY_CHANGE)
    """On a GPU use only algorithms that give the same bytes each time, on the same card with the
    same versions: slower; on a CPU runs are reproducible without it."""
    float64: bool = False
    """Train in double precision: slow; to compare runs almost without rounding errors."""
    overfit_one_batch: bool = False
    """Debug: train on the first batch only; a correct model's loss then falls far."""
    profile_steps: int = field(default=0, metadata=MAY_CHANGE)
    """Debug: write a trace of this many steps to profile/, for Perfetto or TensorBoard."""
    threads: int | None = field(default=None, metadata=MAY_CHANGE)
    """Threads of a process on a CPU; null is OMP_NUM_THREADS if you set it, else the machine's
    cores divided by its processes. Another number rounds differently."""
    timeout_minutes: float = field(default=30, metadata=MAY_CHANGE)
    """Minutes without progress (a step, a save, ...) after which a hanging process is ended with
    code 1 and a line that names what it was doing; 0: never."""
    detect_anomaly: bool = field(default=False, metadata=MAY_CHANGE)
    """Debug: name the operation whose gradient is not finite; slow."""

    @property
    def cadences(self) -> dict[str, int]:
        """Return the images between two logs, sample grids and checkpoints; 0: never."""

        def every(given: int | None, parts: int, maximum: int) -> int:
            part = max(self.total_images // parts, self.global_batch)
            return min(part, maximum) if given is None else given

        return {
            "log": every(self.log_every_images, 50, 12_800),
            "samples": every(self.sample_every_images, 3, 1_280_000),
            "checkpoint": every(self.save_every_images, 3, 1_280_000),
        }

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights and images."""
        return torch.float64 if self.float64 else torch.float32


@dataclass
class Job:
    """The parts of a run."""

    folder: Path
    seed: int
    config: TrainConfig
    optim: dict[str, OptimConfig]  # by net
    engine: Engine
    objective: Objective
    nets: dict[str, nn.Module]
    data: Images
    data_id: str  # changes with the data's contents
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    settings: dict[str, Any]  # the whole configuration, flat, for trackers
    trackers: list[Any] = field(default_factory=list)  # names, or accelerate's GeneralTracker
    data_line: str = ""  # describes the data in the summary; empty: no line
    changed: dict[str, list[Any]] = field(default_factory=dict)  # keys that differ from before
    # Evaluates the EMA weights during training; collective. The checkpoint with the lowest value of
    # the first metric is kept.
    evaluation: Callable[[Nets], dict[str, float]] | None = None
    former_data_ids: tuple[str, ...] = ()  # ids of the same data in older versions
    eval_every_images: int = 0
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(0))


def compile_mode(config: TrainConfig) -> Literal["graphs", "all", "noise", "none"]:
    """Return what to compile, with `auto` resolved."""
    if config.compile == "auto":
        return "all" if on_gpu() else "noise"
    return config.compile


def captures_steps(config: TrainConfig, launch: Launch) -> bool:
    """Return whether whole steps are captured as CUDA graphs, which requires one process."""
    one_process = launch.processes == 1 and launch.zero is None
    # Anomaly detection synchronizes with the device, which cannot be captured.
    return config.compile == "graphs" and one_process and not config.detect_anomaly


def noising_mode(config: TrainConfig) -> Literal["eager", "compiled", "kernel"]:
    """Return the implementation of noising."""
    if compile_mode(config) == "none":
        return "eager"
    return "kernel" if uses_kernels(config) else "compiled"


def apply_net_options(
    nets: Nets, config: TrainConfig, launch: Launch, device: torch.device
) -> None:
    """Apply kernels, compilation and activation checkpointing; raise UserError naming a key."""
    compiling = compile_mode(config)
    is_zero_3 = launch.zero is not None and launch.zero.stage == 3
    for net in nets.values():
        if uses_kernels(config):
            use_kernels(net, device)
        if compiling in ("all", "graphs") and not is_zero_3:
            compile_net(net, graphs=compiling == "graphs" and not captures_steps(config, launch))
    if config.activation_checkpointing and not sum(map(recompute_activations, nets.values())):
        raise UserError(
            "train.activation_checkpointing is true, but these nets have no blocks that can be "
            "recomputed (each pass changes the state of BatchNorm and spectral norm): leave it out"
        )


def uses_kernels(config: TrainConfig) -> bool:
    """Return whether our own kernels are used; they have no double precision."""
    return config.kernels and not config.float64


def check_config(config: TrainConfig, launch: Launch) -> None:
    """Raise UserError where a setting is invalid, or not supported by the launcher's engine."""
    positive = ("total_images", "log_every_images", "keep_checkpoints")
    check_range(config, "train.", *positive, min=1)
    check_range(config, "train.", "global_batch", "micro_batch", min=1, max=MAX_GLOBAL_BATCH)
    check_range(config, "train.", "samples_per_class", min=1, max=1000)
    nonnegative = (
        "sample_every_images",
        "save_every_images",
        "ema_halflife_images",
        "profile_steps",
    )
    check_range(config, "train.", *nonnegative, "timeout_minutes", min=0)
    if config.float64 and config.mixed_precision == "bf16":
        raise UserError("train.float64 and train.mixed_precision bf16 exclude each other: set one")
    if launch.zero is not None and config.float64:
        raise UserError("train.float64 is set, but ZeRO keeps fp32 weights: use one process or DDP")
    if config.compile == "graphs" and not on_gpu():
        raise UserError("train.compile is graphs, but there is no GPU: choose auto or all")
    if launch.zero is not None and launch.zero.stage == 3 and config.compile in ("all", "graphs"):
        raise UserError(
            f"train.compile is {config.compile}, but ZeRO-3 fetches weights as a layer needs them, "
            "which cannot be compiled: choose auto or noise, or a lower zero_stage"
        )


def check_micro_batches(objective: Objective, batches: BatchSampler) -> None:
    """Raise UserError where micro-batches would change the result."""
    needs_whole_batch = isinstance(objective, WholeBatch) and objective.whole_batch
    if needs_whole_batch and batches.num_micro > 1:
        raise UserError(
            f"train.micro_batch {batches.micro_batch} splits the {batches.images_per_rank} images "
            "of a process, but BatchNorm makes images of a batch depend on each other: leave it "
            "out, or choose a model without BatchNorm"
        )
