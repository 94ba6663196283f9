"""Kernels against float64 and against the draws of the eager CPU; AdamW against torch's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from dgm.diffusion.forward_process import ForwardProcess
from dgm.diffusion.schedule import linear
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.nn.kernels import precompile
from dgm.nn.kernels.norm import Dropout
from dgm.nn.layers import NormAct
from dgm.rng import Draws
from dgm.training.optimizer import AdamW, OptimConfig
from tests.gpu.checks.registry import Context, Group, relative_error

GROUP = Group()
SEED = 2**40 + 7  # non-zero in both halves of the key
COUNT, DROPOUT = 3, "dropout/up3.1"  # number of images, purpose of the dropout draws
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@GROUP.check("draws: Philox, integers and dropout masks, bit for bit", quick=True)
def draws_are_equal(context: Context) -> str:
    """Eager draws do not depend on the device, except for rounding of normal numbers."""
    index = torch.arange(64)
    own, theirs = (_draws(index, device) for device in (context.device, "cpu"))
    for name, draw in {
        "Philox": lambda draws: torch.stack([*draws.bits("noise", 3072)]),
        "integers": lambda draws: draws.integers("timestep", 1000),
        "masks": lambda draws: draws.keep_mask("dropout", (8, 8, 32), 0.1),
        "uniform numbers": lambda draws: draws.uniform("noise", (32, 32, 3)),
    }.items():
        assert torch.equal(draw(own).cpu(), draw(theirs)), f"{name} differ"
    normal = [draws.normal("noise", (32, 32, 3)) for draws in (own, theirs)]
    return f"normal numbers {relative_error(*normal):.1e} apart"


@GROUP.check("noise kernel: timesteps, labels, flips and x_t equal the eager CPU's", quick=True)
def noise_is_equal(context: Context) -> str:
    """Timesteps and labels are equal, images up to rounding."""
    count = 257 if context.gpu else 3
    schedule, worst = linear(1000), 0.0
    images = Draws.of(9, torch.arange(count)).uniform("noise", (32, 32, 3)).mul(256).byte()
    index = torch.arange(count)

    def given(device: str) -> list[Any]:
        levels = (part.float().to(device) for part in (schedule.alphas, schedule.sigmas))
        steps = (index % 2).to(device)
        draws = Draws.of(SEED, (1000 * index + 3).to(device), steps)
        return [images.to(device), (index % 10).to(device), *levels, draws]

    for prediction, dequantize in (("eps", False), ("v", True), ("x_0", False)):
        plain = ForwardProcess(prediction, 0.3, 10, flip=True, dequantize=dequantize, keep_x_0=True)
        fused = dataclasses.replace(plain, backend="kernel")
        made, expected = fused(*given(context.device)), plain(*given("cpu"))
        assert torch.equal(made.t.cpu(), expected.t), "timesteps differ"
        assert torch.equal(made.labels.cpu(), expected.labels), "dropped labels differ"
        for part in ("x_t", "target", "x_0"):
            pair = getattr(made, part).cpu(), getattr(expected, part)
            torch.testing.assert_close(*pair, rtol=2e-6, atol=4e-6)
            worst = max(worst, relative_error(*pair))
    rounded = fused(*given(context.device), dtype=torch.bfloat16)
    assert rounded.x_t.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.x_t.cpu().float(), expected.x_t, rtol=8e-3, atol=1e-5)
    return f"images at most {worst:.1e} apart"


class Launch(NamedTuple):
    """A normalization of the U-Net: its layer and the shapes of its inputs, without the batch."""

    groups: int
    channels: int
    silu: bool
    image: tuple[int, ...]  # x
    skip: int  # channels of the skip connection, read without concatenation
    added: bool
    dropout: bool


@functools.cache
def launches(width: int = 128) -> tuple[Launch, ...]:
    """Return the distinct normalizations of a U-Net, by default that of 35.7 M parameters."""
    found: list[Launch] = []
    names = [*inspect.signature(NormAct.forward).parameters][1:]

    def record(module: Any, args: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
        given = dict(zip(names, args, strict=False)) | named
        skip, dropout = given.get("skip"), given.get("dropout")
        assert given.get("scale_shift") is None, "the large net adds the embedding"
        found.append(
            Launch(
                module.num_groups, module.num_channels, module.silu, tuple(given["x"].shape[1:]),
                0 if skip is None else skip.shape[1], given.get("added") is not None,
                dropout is not None and dropout.p > 0,
            )
        )  # fmt: skip

    with torch.device("meta"), torch.no_grad():
        net = UNet(UNetConfig(channels=width, dropout=0.1), 32, 3, num_classes=10)
        for module in net.modules():
            if isinstance(module, NormAct):
                module.register_forward_hook(record, with_kwargs=True)
        index = torch.zeros(2, dtype=torch.int64)
        # As on a GPU, whose kernels read x and skip without concatenating them.
        with mock.patch.object(NormAct, "reads_separately", lambda module, x: True):
            net(torch.zeros(2, 3, 32, 32), index, index, Draws(index, index, index))
    return tuple(dict.fromkeys(found))


def _chosen(context: Context) -> tuple[Launch, ...]:
    """Return all launches of the large net on a GPU; in the interpreter two of a narrow net."""
    if context.gpu:
        return launches()
    by_size = sorted(launches(32), key=lambda launch: torch.Size(launch.image).numel())
    return next(x for x in by_size if x.dropout), next(x for x in by_size if x.skip)


def _draws(index: Tensor, device: str) -> Draws:
    return Draws.of(SEED, (index + 3).to(device), index.to(device))


def norm_results(
    launch: Launch, device: str, dtype: torch.dtype, rounded: torch.dtype
) -> dict[str, Tensor]:
    """Return y and, where gradients are enabled, all gradients of a normalization.

    Its inputs are representable in `rounded`; in float64 our kernels are not used.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = launch.image[1:]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def put(part: Tensor) -> Tensor:
        part = part.to(rounded).to(device, dtype)
        return part.contiguous(memory_format=torch.channels_last) if part.ndim == 4 else part

    given = {"x": 2 * normal(COUNT, *launch.image) + 3}
    if launch.skip:
        given["skip"] = normal(COUNT, launch.skip, height, width)
    if launch.added:
        given["added"] = normal(COUNT, launch.channels)
    grad = put(normal(COUNT, launch.channels, height, width))
    layer = NormAct(launch.groups, launch.channels, launch.silu)
    for part in (layer.weight, layer.bias):
        part.data.copy_(normal(launch.channels))
    layer = layer.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    layer.kernels = None if dtype == torch.float64 else "triton"
    leaves = {name: put(part).requires_grad_() for name, part in given.items()}
    draws = _draws(torch.arange(COUNT), device)
    dropout = Dropout(0.1, draws, DROPOUT) if launch.dropout else None
    y = layer(**leaves, dropout=dropout)
    if not torch.is_grad_enabled():
        return {"y": y}
    y.backward(grad)
    leaves |= dict(layer.named_parameters())
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def _norms(context: Context, dtype: torch.dtype) -> str:
    worst: dict[str, float] = {}
    if context.gpu:  # in parallel, as compiling one by one takes minutes
        with precompile.collect() as found, torch.no_grad():
            for launch in _chosen(context):
                norm_results(launch, context.device, dtype, dtype)
        found.compile()
    for launch in _chosen(context):
        made = norm_results(launch, context.device, dtype, dtype)
        for part, value in norm_results(launch, "cpu", torch.float64, dtype).items():
            error = relative_error(made[part], value)
            assert error < LIMITS[dtype], f"{part} of {launch} is {error:.1e} apart"
            worst[part] = max(worst.get(part, 0.0), error)
    errors = ", ".join(f"{part} {error:.1e}" for part, error in worst.items())
    return f"{len(_chosen(context))} shapes: {errors}"


@GROUP.check("norm kernel, forward and backward, against float64, fp32", 150, quick=True)
def norm_fp32(context: Context) -> str:
    """At every shape that occurs in the 35.7 M U-Net."""
    return _norms(context, torch.float32)


@GROUP.check("norm kernel, forward and backward, against float64, bf16", 150, quick=True)
def norm_bf16(context: Context) -> str:
    """At every shape that occurs in the 35.7 M U-Net."""
    return _norms(context, torch.bfloat16)


@GROUP.check("norm kernel drops what the eager CPU drops, bit for bit", quick=True)
def dropout_is_equal(context: Context) -> str:
    """A feature is zero where, and only where, the mask drops it."""
    checked = 0
    draws = _draws(torch.arange(COUNT), "cpu")
    for launch in _chosen(context):
        if launch.dropout:
            y = norm_results(launch, context.device, torch.float32, torch.float32)["y"]
            mask = draws.keep_mask(DROPOUT, (*launch.image[1:], launch.channels), 0.1)
            assert torch.equal(y.cpu() != 0, mask.permute(0, 3, 1, 2)), f"another mask: {launch}"
            checked += mask.numel()
    return f"{checked:,} features"


@GROUP.check("AdamW equals torch's, and a skipped step leaves the weights unchanged", quick=True)
def optimizer_is_torchs(context: Context) -> str:
    """Against torch.optim.AdamW in float64."""
    torch.manual_seed(0)
    shapes = (64, 32, 3, 3), (16, 8, 1, 1), (64,)
    first = [torch.randn(shape) for shape in shapes]
    first[0] = first[0].contiguous(memory_format=torch.channels_last)
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    ours = [torch.nn.Parameter(part.to(context.device, copy=True)) for part in first]
    theirs = [torch.nn.Parameter(part.double()) for part in first]
    made = AdamW(ours, config)
    expected = torch.optim.AdamW(
        theirs, lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.1
    )
    off, on = (torch.full((), value, device=context.device) for value in (0.0, 1.0))
    for _ in range(5):
        for own, their in zip(ours, theirs, strict=True):
            their.grad = torch.randn_like(their)
            own.grad = torch.empty_like(own).copy_(their.grad)
        made.step(1e-2, off)
        expected.step()
    worst = max(relative_error(own, their) for own, their in zip(ours, theirs, strict=True))
    assert worst < 1e-6, f"{worst:.1e} apart"
    before = [part.detach().clone() for part in ours]
    made.step(1e-2, on)
    assert all(map(torch.equal, ours, before)), "a step was made that should have been skipped"
    return f"{worst:.1e} apart after five steps"
