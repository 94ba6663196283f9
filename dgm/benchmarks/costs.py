"""Costs of the operations of a training step on a GPU: FLOPs, bytes, kernel launches.

Each operation reads each of its inputs and writes each of its outputs once, activations in bf16
(2 bytes). `dgm.benchmarks.unet_costs` adds the layers of the U-Net.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

BF16, FP32 = 2, 4


class Kind(StrEnum):
    """Kind of an operation."""

    CONVOLUTION_3X3 = "3x3 convolutions"
    SHORTCUT = "1x1 convolutions of shortcuts"
    PROJECTION = "qkv and out of attention"
    ATTENTION = "attention itself"
    NORM = "norm, SiLU, dropout"
    BIAS = "biases and their gradients"
    SUM = "residual and gradient sums"
    UPSAMPLE = "upsampling"
    EMBEDDING = "time embedding"
    CAST = "weights to bf16, gradients to fp32"
    NOISE = "batch and noise"
    LOSS = "loss"
    CLIP = "gradient norm and clipping"
    OPTIMIZER = "AdamW"
    AVERAGE = "moving average"


OUTSIDE_NET = (Kind.NOISE, Kind.LOSS, Kind.CLIP, Kind.OPTIMIZER, Kind.AVERAGE)
"""Kinds that are not part of the compiled net, so that its CUDA graphs do not contain them."""


@dataclass(frozen=True)
class Operation:
    """One or several kernels; FLOPs and bytes are per image."""

    kind: Kind
    layer: str
    stage: str
    """`forward`, `backward` or `update`."""
    flops: float = 0.0
    bytes: float = 0.0
    fixed_bytes: float = 0.0
    """Bytes of weights, independent of the batch."""
    launches: int = 1
    custom: bool = False
    """Called as a custom operator."""


@dataclass
class StepCosts:
    """Operations of a step, and memory kept for the backward pass."""

    dropout: float
    operations: list[Operation] = field(default_factory=list)
    kept_bytes: float = 0.0
    """Bytes kept for the backward pass, per image."""
    largest_bytes: float = 0.0
    """Bytes of the largest feature map, per image."""
    resized: list[Tensor] = field(default_factory=list)
    """Feature maps that a convolution outside of a block reads."""

    def add(self, kind: Kind, layer: str, stage: str, elements: float = 0, **more: Any) -> None:
        """Add an operation that moves `elements` in bf16 per image, and bytes given in `more`."""
        more["bytes"] = more.get("bytes", 0) + BF16 * elements
        self.operations.append(Operation(kind, layer, stage, **more))

    def keep(self, elements: float, bytes_each: float = BF16) -> None:
        """Add a tensor that is kept for the backward pass."""
        self.kept_bytes += bytes_each * elements
        self.largest_bytes = max(self.largest_bytes, bytes_each * elements)

    def product(
        self, kind: Kind, layer: str, shape: Sequence[int], inputs: int, outputs: int,
        data_gradient: bool = True,
    ) -> None:  # fmt: skip
        """Add a convolution or matrix product: forward pass, gradients of input and weight.

        shape: that of the weight, [C_out, C_in, ...]; inputs, outputs: positions of one image.
        """
        weights = math.prod(shape)
        work = {
            "flops": 2 * weights * outputs,
            "elements": shape[1] * inputs + shape[0] * outputs,
            "fixed_bytes": BF16 * weights,
        }
        self.add(kind, layer, "forward", **work)
        if data_gradient:
            self.add(kind, layer, "backward", **work)
        self.add(kind, layer, "backward", **work)

    def bias(self, layer: str, elements: float, own_pass: bool) -> None:
        """Add a bias: a pass over the output unless fused, and its gradient."""
        if own_pass:
            self.add(Kind.BIAS, layer, "forward", 2 * elements)
        # In two kernels: parts of the batch, then their sum.
        self.add(Kind.BIAS, layer, "backward", elements, launches=2)

    def linear(self, layer: str, shape: Sequence[int], data_gradient: bool = True) -> None:
        """Add a linear layer of the time embedding, with a fused bias."""
        self.product(Kind.EMBEDDING, layer, shape, 1, 1, data_gradient)
        self.add(Kind.EMBEDDING, layer, "backward", shape[0], launches=2)  # bias
        self.keep(shape[1])


def add_noise_and_loss(costs: StepCosts, elements: int) -> None:
    """Add the operations outside the net: batch, noise and loss."""
    costs.add(Kind.NOISE, "batch", "forward", bytes=2 * elements, launches=2)  # uint8, and labels
    costs.add(Kind.NOISE, "noise", "forward", bytes=(1 + BF16 + FP32) * elements)
    costs.add(Kind.NOISE, "levels", "forward", launches=3)  # alpha, sigma and snr of each timestep
    # Difference, square and sum in fp32; their gradients, and a cast to bf16.
    costs.add(Kind.LOSS, "loss", "forward", bytes=22 * elements, launches=8)
    costs.add(Kind.LOSS, "loss", "backward", bytes=22 * elements, launches=7)
    costs.keep(elements, FP32)


def add_update(costs: StepCosts, sizes: list[int]) -> None:
    """Add the gradient's norm and clipping, AdamW and the moving average, all in fp32."""
    one, two, four = (multi_tensor_launches(sizes, lists) for lists in (1, 2, 4))
    for kind, layer, accesses, launches in (
        (Kind.CLIP, "norm", 1, 2 * one + 2),
        (Kind.CLIP, "clip", 2, one + 3),
        # Reads weight, gradient and both moments; writes all but the gradient.
        (Kind.OPTIMIZER, "all", 7, four),
        (Kind.AVERAGE, "all", 3, two),
    ):
        fixed = accesses * FP32 * sum(sizes)
        costs.add(kind, layer, "update", fixed_bytes=fixed, launches=launches)


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """Return the number of kernels of a torch foreach operation over `lists` lists of tensors.

    A launch takes at most 320 chunks of 65,536 elements, and as many tensors as its arguments hold
    (torch's MultiTensorApply.cuh; versions that pass larger arguments launch fewer).
    """
    max_tensors = {1: 110, 2: 64, 3: 48, 4: 36}[lists]
    launches = tensors = chunks = 0
    for size in sizes:
        tensors += 1
        for chunk in range(-(-size // 65_536)):
            chunks += 1
            last = (chunk + 1) * 65_536 >= size
            if chunks == 320 or (last and tensors == max_tensors):
                launches += 1
                tensors, chunks = int(not last), 0
    return launches + (chunks > 0)
