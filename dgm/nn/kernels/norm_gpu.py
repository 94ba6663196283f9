"""Launching the Triton kernels of `norm_act`: tile sizes and compile-time options.

A thread has at most 32 elements of a tile: the backward kernel keeps two tiles in 128 registers, so
that two programs of 8 warps fit on a multiprocessor of an H100.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dgm.nn.kernels import precompile
from dgm.nn.kernels.dispatch import channels_last, empty_channels_last
from dgm.rng import int32

Maybe = Tensor | None

_MAX_REGISTERS = 128
_TILE = 8192  # elements
_MAX_TILE = 16384  # elements; with 16 warps
_VECTOR = 4  # channels that a thread loads at once
_MIN_CHANNELS, _MAX_CHANNELS = 8, 32  # per tile, unless a group has more
MAX_GROUP = 64  # channels per group


def forward(
    x: Tensor, skip: Maybe, affine: list[Maybe], draws: list[Maybe], groups: int, eps: float,
    silu: bool, drop: float, purpose: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, fp32 mean and rstd [B, groups], and the mask, uint8 [B, H W / 8, C] or [0].

    `affine` is [added, weight, bias, scale, shift], `draws` is [key, index, step].
    """
    from dgm.nn.kernels import norm_triton

    x, skip = channels_last(x), channels_last(skip)
    tile = Tile(x, joined_channels(x, skip), groups)
    new = dict(dtype=torch.float32, device=x.device)
    y = empty_channels_last(x, joined_channels(x, skip))
    mean, rstd = torch.empty(len(x), groups, **new), torch.empty(len(x), groups, **new)  # type: ignore[call-overload]
    dropping = draws[0] is not None and drop > 0
    mask = empty_mask(x, skip, dropping)
    given = [*map(contiguous, affine), *(map(contiguous, draws) if dropping else [None] * 3)]
    options = tile.options(affine, silu, dropping)
    options["STEP_EACH"] = dropping and draws[2] is not None and draws[2].ndim > 0
    precompile.launch(
        norm_triton.forward, tile.grid(len(x)),
        x, skip, *given, y, mean, rstd, mask if dropping else None,
        *tile.sizes, eps, int32(purpose), *threshold_and_factor(drop), **options,
    )  # fmt: skip
    if precompile.collecting():
        y.zero_()
        backward(y, x, skip, affine, mask, mean, rstd, groups, silu, drop)
    return y, mean, rstd, mask


def backward(
    grad: Tensor, x: Tensor, skip: Maybe, affine: list[Maybe], mask: Tensor, mean: Tensor,
    rstd: Tensor, groups: int, silu: bool, drop: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Return dx, d_skip (or [0]) and fp32 [B, C] sums over H and W of dz, dz x_hat and du.

    The sum of du is empty where `affine` has no `added`.
    """
    from dgm.nn.kernels import norm_triton

    grad, x, skip = channels_last(grad), channels_last(x), channels_last(skip)
    tile = Tile(x, joined_channels(x, skip), groups)
    dx, d_skip = torch.empty_like(x), x.new_empty(0) if skip is None else torch.empty_like(skip)
    sums = empty_sums(x, skip, affine[0])
    dropping = drop > 0 and mask.numel() > 0
    precompile.launch(
        norm_triton.backward, tile.grid(len(x)),
        x, skip, *map(contiguous, affine), mask if dropping else None, mean, rstd, grad,
        dx, None if skip is None else d_skip, *sums[:2], None if affine[0] is None else sums[2],
        *tile.sizes, threshold_and_factor(drop)[1], **tile.options(affine, silu, dropping),
    )  # fmt: skip
    return dx, d_skip, sums


class Tile:
    """The part of an image that a program normalizes: some whole groups of channels."""

    def __init__(self, x: Tensor, channels: int, groups: int):
        _, of_x, height, width = x.shape
        self.group = channels // groups
        segment = height * width // 8
        fitting = _TILE // (8 * _next_power_of_2(segment))
        channels_per_tile = max(_MIN_CHANNELS, min(_MAX_CHANNELS, fitting))
        self.channels = max(channels_per_tile, _next_power_of_2(self.group))
        own = self.channels // self.group * self.group
        self.programs = -(-channels // own)
        self.align = math.gcd(own, channels, of_x, _VECTOR)
        fits = 8 * segment * self.channels <= _MAX_TILE
        self.whole = fits and segment == _next_power_of_2(segment)
        max_rows = max(1, _TILE // (8 * self.channels))
        self.rows = segment if self.whole else min(segment & -segment, max_rows)
        self.warps = max(1, min(16, self.rows * self.channels // (32 * _VECTOR)))
        self.sizes = (segment, channels, of_x)
        self.joined = channels > of_x

    def grid(self, images: int) -> tuple[int]:
        """Return the number of programs."""
        return (self.programs * images,)

    def options(self, affine: list[Maybe], silu: bool, dropping: bool) -> dict[str, Any]:
        """Return the kernel's compile-time constants."""
        return {
            "GROUP": self.group, "ROWS": self.rows, "CHANNELS": self.channels,
            "ALIGN": self.align, "WHOLE": self.whole, "JOINED": self.joined,
            "HAS_ADDED": affine[0] is not None, "HAS_SCALE": affine[3] is not None,
            "SILU": silu, "DROP": dropping,
            "num_warps": self.warps, "maxnreg": _MAX_REGISTERS,
        }  # fmt: skip


def joined_channels(x: Tensor, skip: Maybe) -> int:
    """Return the number of channels of x and skip together."""
    return x.shape[1] + (0 if skip is None else skip.shape[1])


def empty_mask(x: Tensor, skip: Maybe, dropping: bool) -> Tensor:
    """Return an uninitialized mask of dropout bits, [B, H W / 8, C], or [0] without dropout."""
    own = (x.shape[0], x.shape[2] * x.shape[3] // 8, joined_channels(x, skip))
    shape = own if dropping else (0,)
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def empty_sums(x: Tensor, skip: Maybe, added: Maybe) -> list[Tensor]:
    """Return three uninitialized sums, fp32 [B, C]; the last is [0] without `added`."""
    own = (x.shape[0], joined_channels(x, skip))
    sizes = [own, own, (0,) if added is None else own]
    return [torch.empty(size, dtype=torch.float32, device=x.device) for size in sizes]


def threshold_and_factor(drop: float) -> tuple[int, float]:
    """Return the 16-bit number below which an element is dropped, and the factor of the others."""
    return round(drop * 65536), 1 / (1 - drop)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def contiguous(tensor: Maybe) -> Maybe:
    """Return the tensor, contiguous; None for None."""
    return None if tensor is None else tensor.contiguous()
