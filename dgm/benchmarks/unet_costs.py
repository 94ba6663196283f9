"""Costs of a training step of the diffusion U-Net on a GPU, layer by layer.

They follow from the shapes of each layer's weights and inputs, found on the meta device. Pointwise
operations that inductor fuses are one pass: a residual sum with its biases, and the sum of the
gradients of a feature map that several layers read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dgm.benchmarks.costs import BF16, FP32, Kind, StepCosts, add_noise_and_loss, add_update
from dgm.diffusion.unet import UNet, UNetBlock
from dgm.nn.layers import Attention, DeferredBiasConv2d, NormAct, PointwiseConv2d, Upsample


def step_costs(net: UNet, image_size: int) -> StepCosts:
    """Return the costs of a step of a net on the meta device, with concat skips and no classes.

    The net cannot be used otherwise afterwards.
    """
    costs = StepCosts(net.config.dropout)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    add_noise_and_loss(costs, int(net.entry.weight.shape[1]) * image_size**2)
    moved_bytes = (FP32 + BF16) * sum(p.numel() for p in matrices)
    # A kernel per weight and bias; the gradient of a bias is rounded by the kernel that sums it.
    costs.add(Kind.CAST, "all", "forward", fixed_bytes=moved_bytes, launches=2 * len(matrices))
    costs.add(Kind.CAST, "all", "backward", fixed_bytes=moved_bytes, launches=len(matrices))
    costs.add(Kind.EMBEDDING, "time", "forward", launches=3)  # sines, and SiLU twice
    costs.add(Kind.EMBEDDING, "time", "backward", launches=2)
    for name, module in net.named_modules():
        if isinstance(module, NormAct):
            # As on a GPU, whose kernels read h and a skip without concatenating them.
            module.reads_separately = lambda x: True  # type: ignore[method-assign]
        if add := LAYERS.get(type(module)):
            hook = functools.partial(add, costs, name)
            module.register_forward_hook(hook, with_kwargs=True)
    x = torch.empty(1, 3, image_size, image_size, device="meta")
    net(x, torch.zeros(1, dtype=torch.int64, device="meta"))
    add_update(costs, [p.numel() for p in net.parameters()])
    return costs


def _norm(
    costs: StepCosts, layer: str, norm: NormAct, args: tuple[Tensor], named: dict[str, Any],
    output: Tensor,
) -> None:  # fmt: skip
    """Add a norm; the second of a block adds the embedding and applies dropout."""
    elements, channels, second = output.numel(), norm.num_channels, named.get("added") is not None
    mask = elements / 8 if second and costs.dropout else 0  # one bit each
    small = 8 * norm.num_groups + (BF16 * channels if second else 0)
    sums = FP32 * channels * (3 if second else 2)
    costs.add(Kind.NORM, layer, "forward", 2 * elements, bytes=mask + small, custom=True)
    costs.add(Kind.NORM, layer, "backward", 3 * elements, bytes=mask + small + sums, custom=True)
    # The gradients of weight and bias are summed over images, each in two kernels.
    costs.add(Kind.NORM, layer, "backward", bytes=sums, launches=4)
    costs.keep(args[0].numel())  # a skip is kept by the down path
    costs.keep(mask, 1)
    costs.keep(elements)  # the output, which a convolution reads


def _convolution(
    costs: StepCosts, layer: str, conv: nn.Conv2d, args: tuple[Tensor], named: Any, output: Any
) -> None:
    """Add a 3x3 convolution; the norm after a block's first convolution adds its bias."""
    x, in_block = args[0], layer.endswith(("conv1", "conv2"))
    y = output[0] if isinstance(conv, DeferredBiasConv2d) else output
    positions = x[0, 0].numel(), y[0, 0].numel()
    kind = Kind.CONVOLUTION_3X3
    costs.product(kind, layer, conv.weight.shape, *positions, data_gradient=x.requires_grad)
    if not isinstance(conv, DeferredBiasConv2d):
        costs.bias(layer, y.numel(), own_pass=not in_block)
    if not in_block and layer != "exit":  # others read the output of a norm
        costs.keep(x.numel())
        costs.resized.append(x)


def _pointwise(
    costs: StepCosts, layer: str, conv: PointwiseConv2d, args: tuple[Tensor, ...], named: Any,
    output: Tensor,
) -> None:  # fmt: skip
    """Add a product for each input: the shortcut has one for h and one for the skip."""
    is_shortcut, positions = layer.endswith("shortcut"), output[0, 0].numel()
    for part in args:
        shape = (output.shape[1], part.shape[1])
        kind = Kind.SHORTCUT if is_shortcut else Kind.PROJECTION
        costs.product(kind, layer, shape, positions, positions)
    if not is_shortcut:  # the pass that adds a shortcut adds its bias and that of conv2
        costs.bias(layer, output.numel(), own_pass=False)


def _linear(
    costs: StepCosts, layer: str, linear: nn.Linear, args: tuple[Tensor], named: Any, output: Tensor
) -> None:
    costs.linear(layer, linear.weight.shape, data_gradient=args[0].requires_grad)
    if layer.endswith("emb"):
        costs.add(Kind.EMBEDDING, layer, "backward", 3 * output.numel())  # fp32 sums to bf16


def _block(
    costs: StepCosts, layer: str, block: UNetBlock, args: tuple[Any, ...], named: Any,
    output: Tensor,
) -> None:  # fmt: skip
    """Add the sums of a residual block of h and perhaps a skip."""
    h, skip = args[0], args[3] if len(args) > 3 else None
    products = 2 if skip is not None and isinstance(block.shortcut, PointwiseConv2d) else 1
    costs.add(Kind.SUM, layer, "forward", (2 + products) * output.numel())
    costs.add(Kind.SUM, layer, "backward", 3 * h.numel())
    if skip is not None:
        # The sum of its gradients from the up and the down path is fused into the pass that sums
        # the gradients of a block, or is a pass of its own if a convolution read it.
        own_pass = any(skip is x for x in costs.resized)
        elements = (4 if own_pass else 2) * skip.numel()
        costs.add(Kind.SUM, f"{layer}.skip", "backward", elements, launches=int(own_pass))


def _attention(
    costs: StepCosts, layer: str, module: Attention, args: tuple[Tensor], named: Any, output: Tensor
) -> None:
    """Add attention itself and its residual."""
    x, positions = output.numel(), output[0, 0].numel()
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


def _upsample(
    costs: StepCosts, layer: str, module: Upsample, args: tuple[Tensor], named: Any, output: Tensor
) -> None:
    """Add upsampling: the pass that computes the map writes it four times."""
    costs.add(Kind.UPSAMPLE, layer, "forward", 3 * args[0].numel())
    costs.add(Kind.UPSAMPLE, layer, "backward", 5 * args[0].numel())


LAYERS: dict[type, Any] = {
    NormAct: _norm,
    nn.Conv2d: _convolution,
    DeferredBiasConv2d: _convolution,
    PointwiseConv2d: _pointwise,
    nn.Linear: _linear,
    UNetBlock: _block,
    Attention: _attention,
    Upsample: _upsample,
}
