"""Costs of a training step of the diffusion U-Net on a GPU, layer by layer.

They follow from the shapes of its weights; nothing is run. Pointwise operations that inductor fuses
are one pass: a residual sum with its biases, and the sum of the gradients of a feature map that
several layers read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

from torch import Tensor, nn

from dgm.benchmarks.costs import BF16, FP32, Design, Kind, StepCosts, add_noise_and_loss, add_update
from dgm.diffusion.unet import UNet, UNetBlock, UNetLevel
from dgm.nn.layers import Attention, NormAct


class Skip(NamedTuple):
    """A feature map that is kept for the up path."""

    name: str
    channels: int
    positions: int
    into_block: bool
    """The next layer of the down path is a residual block (else a convolution)."""


def step_costs(net: UNet, image_size: int, design: Design) -> StepCosts:
    """Return the costs of a training step of a net with concat skips and no classes."""
    costs = StepCosts(design, net.config.dropout)
    sizes = [p.numel() for p in net.parameters()]
    matrices = [p for p in net.parameters() if p.ndim > 1]
    pixels, channels = image_size**2, int(net.entry.weight.shape[1])
    add_noise_and_loss(costs, channels * pixels)
    moved_bytes = (FP32 + BF16) * sum(p.numel() for p in matrices)
    # A kernel per weight and bias; the gradient of a bias is rounded by the kernel that sums it.
    costs.add(Kind.CAST, "all", "forward", fixed_bytes=moved_bytes, launches=2 * len(matrices))
    costs.add(Kind.CAST, "all", "backward", fixed_bytes=moved_bytes, launches=len(matrices))
    costs.add(Kind.EMBEDDING, "time", "forward", launches=3)  # sines, and SiLU twice
    costs.add(Kind.EMBEDDING, "time", "backward", launches=2)
    for number, layer in enumerate(net.time):
        if isinstance(layer, nn.Linear):
            costs.linear(f"time.{number}", layer.weight.shape, data_gradient=number > 0)
    entry = net.entry.weight.shape
    costs.product(Kind.CONVOLUTION_3X3, "entry", entry, pixels, pixels, data_gradient=False)
    costs.keep(channels * pixels)
    costs.bias("entry", entry[0] * pixels, own_pass=True)
    h, size = _add_levels(costs, net, image_size)
    costs.keep(h * size**2)
    _norm(costs, "exit_norm", net.exit_norm, size**2)
    _convolution(costs, "exit", net.exit, size**2)
    costs.bias("exit", net.exit.weight.shape[0] * size**2, own_pass=True)
    add_update(costs, sizes)
    return costs


def _add_levels(costs: StepCosts, net: UNet, size: int) -> tuple[int, int]:
    """Add all levels, down and up; return the final channels and side."""
    h = int(net.entry.weight.shape[0])
    skips = [Skip("entry", h, size**2, into_block=True)]
    for i, level in enumerate(cast(Iterable[UNetLevel], net.down)):
        pairs, last = list(level.pairs()), isinstance(level.resize, nn.Identity)
        for k, pair in enumerate(pairs):
            h = _block(costs, f"down{i}.{k}", pair, h, None, size)
            skips.append(Skip(f"down{i}.{k}", h, size**2, into_block=last or k + 1 < len(pairs)))
        if not last:
            size = _resize(costs, f"down{i}.resize", level.resize, size)
            skips.append(Skip(f"down{i}.resize", h, size**2, into_block=True))
    for k, pair in enumerate(net.middle.pairs()):
        h = _block(costs, f"middle{k}", pair, h, None, size)
    for i, level in enumerate(cast(Iterable[UNetLevel], net.up)):
        name = f"up{len(net.up) - 1 - i}"
        for k, pair in enumerate(level.pairs()):
            h = _block(costs, f"{name}.{k}", pair, h, skips.pop(), size)
        if not isinstance(level.resize, nn.Identity):
            # The block's second convolution and shortcut, and attention's last projection.
            readers = 3 if isinstance(pair[1], Attention) else 2
            size = _resize(costs, f"{name}.resize", level.resize, size, readers)
    return h, size


def _norm(
    costs: StepCosts, layer: str, norm: nn.Module, positions: int, second: bool = False
) -> None:
    """Add a norm; the `second` of a block adds the embedding and applies dropout."""
    norm = cast(NormAct, norm)
    channels = norm.num_channels
    elements = channels * positions
    mask = elements / 8 if second and costs.dropout and costs.design.fuses else 0
    small = 8 * norm.num_groups + (BF16 * channels if second else 0)
    sums = FP32 * channels * (3 if second else 2)
    costs.add(Kind.NORM, layer, "forward", 2 * elements, bytes=mask + small, custom=True)
    costs.add(Kind.NORM, layer, "backward", 3 * elements, bytes=mask + small + sums, custom=True)
    # The gradients of weight and bias are summed over images, each in two kernels.
    costs.add(Kind.NORM, layer, "backward", bytes=sums, launches=4)
    costs.keep(mask, 1)
    costs.keep(elements)  # the output, which a convolution reads


def _block(
    costs: StepCosts, layer: str, modules: tuple[nn.Module, nn.Module], h: int, skip: Skip | None,
    size: int,
) -> int:  # fmt: skip
    """Add a residual block of h [and a skip's] channels at `size`^2, and its attention if any.

    Return its channels.
    """
    block, design, positions = cast(UNetBlock, modules[0]), costs.design, size**2
    outputs, inputs = block.conv1.weight.shape[:2]
    x, y, own = inputs * positions, outputs * positions, h * positions
    joined = skip is None or design.joins
    if skip is not None and design.joins:
        # The pass that computes h writes it into the concatenation and copies the skip.
        costs.add(Kind.JOIN, layer, "forward", 2 * (x - own), launches=0)
    costs.keep(x if joined else own)  # a skip is kept by the down path
    _norm(costs, f"{layer}.norm1", block.norm1, positions)
    _convolution(costs, f"{layer}.conv1", block.conv1, positions)
    if not design.fuses:
        costs.bias(f"{layer}.conv1", y, own_pass=True)
    costs.keep(y)
    costs.linear(f"{layer}.emb", block.emb.weight.shape)
    costs.add(Kind.EMBEDDING, f"{layer}.emb", "backward", 3 * outputs)  # fp32 sums to bf16
    _norm(costs, f"{layer}.norm2", block.norm2, positions, second=True)
    _convolution(costs, f"{layer}.conv2", block.conv2, positions)
    projected = not isinstance(block.shortcut, nn.Identity)
    parts = [inputs] if joined or skip is None else [h, skip.channels]
    for part in parts if projected else []:
        shape = (outputs, part, 1, 1)
        costs.product(Kind.SHORTCUT, f"{layer}.shortcut", shape, positions, positions)
    # The pass that adds the shortcut adds both biases too, which have one gradient.
    more = len(parts) - 1 if projected else 0
    costs.add(Kind.SUM, layer, "forward", (3 + more) * y)
    costs.bias(f"{layer}.conv2", y, own_pass=False)
    costs.add(Kind.SUM, layer, "backward", 3 * own)
    if skip is not None:
        # The sum of its gradients from the up and the down path is fused into the pass that sums a
        # block's gradients, or is a pass of its own.
        own_pass = not skip.into_block
        elements = (4 if own_pass else 2) * skip.channels * skip.positions
        costs.add(Kind.SUM, skip.name, "backward", elements, launches=int(own_pass))
    if isinstance(modules[1], Attention):
        _attention(costs, f"{layer}.attention", modules[1], positions)
    return int(outputs)


def _convolution(costs: StepCosts, layer: str, conv: nn.Module, positions: int) -> None:
    costs.product(Kind.CONVOLUTION_3X3, layer, _weight(conv).shape, positions, positions)


def _attention(costs: StepCosts, layer: str, module: Attention, positions: int) -> None:
    """Add attention with its norm, projections and residual."""
    channels = module.norm.num_channels
    x = channels * positions
    costs.keep(x)
    _norm(costs, f"{layer}.norm", module.norm, positions)
    for name, times in (("qkv", 3), ("out", 1)):
        shape = (times * channels, channels)
        costs.product(Kind.PROJECTION, f"{layer}.{name}", shape, positions, positions)
    costs.bias(f"{layer}.qkv", 3 * x, own_pass=not costs.design.fuses)
    costs.bias(f"{layer}.out", x, own_pass=False)
    flops, logsumexp = 4 * positions * x, FP32 * module.num_heads * positions
    costs.add(Kind.ATTENTION, layer, "forward", 4 * x, flops=flops, bytes=logsumexp)
    # Scores are computed again: five products instead of two. Three kernels.
    costs.add(
        Kind.ATTENTION, layer, "backward", 8 * x, flops=2.5 * flops, bytes=logsumexp, launches=3
    )
    costs.add(Kind.ATTENTION, layer, "backward", 6 * x)  # gradients of q, k and v into one tensor
    costs.keep(4 * x)
    costs.keep(logsumexp, 1)
    costs.add(Kind.SUM, layer, "forward", 3 * x)
    costs.add(Kind.SUM, layer, "backward", 3 * x)


def _resize(costs: StepCosts, layer: str, resize: nn.Module, size: int, readers: int = 0) -> int:
    """Add the convolution that halves or doubles the image; return its new side.

    readers: convolutions that read the gradient of the upsampled map.
    """
    up = isinstance(resize, nn.Sequential)
    conv = cast(nn.Sequential, resize)[1] if up else resize
    outputs, inputs = _weight(conv).shape[:2]
    new = 2 * size if up else size // 2
    entering = new if up else size  # side of the convolution's input
    if up:
        _upsample(costs, layer, inputs * size**2, readers)
    costs.product(Kind.CONVOLUTION_3X3, layer, _weight(conv).shape, entering**2, new**2)
    costs.keep(inputs * entering**2)
    costs.bias(layer, outputs * new**2, own_pass=True)
    return new


def _upsample(costs: StepCosts, layer: str, elements: float, readers: int) -> None:
    """Add upsampling of a feature map of `elements` to four times as many.

    The pass that computes the map writes it four times. The gradient of torch's operator is, under
    inductor, summed by atomics into an fp32 map that is zeroed before and rounded to bf16 after; it
    is in NCHW, so each of its `readers` copies it into channels_last.
    """
    costs.add(Kind.UPSAMPLE, layer, "forward", 3 * elements)  # a kernel for the indices
    if costs.design.fuses:
        costs.add(Kind.UPSAMPLE, layer, "backward", 5 * elements)
        return
    costs.add(Kind.UPSAMPLE, layer, "backward", bytes=FP32 * elements)
    adds = 4 * elements
    costs.add(Kind.UPSAMPLE, layer, "backward", adds, bytes=2 * FP32 * adds)
    costs.add(Kind.UPSAMPLE, layer, "backward", elements, bytes=FP32 * elements)
    costs.add(Kind.UPSAMPLE, layer, "backward", 2 * readers * elements, launches=readers)


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)
