"""Random draws as functions: `f(seed, purpose, step or epoch, image index)`.

Every draw is computed by the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). The key is the run's seed; the counter consists of the index
of a block of four numbers within one image's draw, the image's index, the step (or epoch) and the
purpose. So there is no generator state: any number can be recomputed, on any process, in any batch.

Integers are exact, hence equal in eager and compiled code and on every device.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Lanes, key: tuple[Tensor, Tensor]) -> Lanes:
    """Compute Philox4x32-10 of int64 tensors that hold unsigned 32-bit numbers.

    The tensors broadcast against each other; each result lies in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # An int64 product wraps around, yet its bit pattern is that of the unsigned product,
        # so shift and mask give both halves.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def purpose_id(purpose: str) -> int:
    """Return the 32-bit number of a purpose in the counter."""
    return zlib.crc32(purpose.encode())


def int32(number: int) -> int:
    """Return the signed 32-bit integer with the bits of an unsigned one.

    Triton would recompile a kernel for an integer that needs 64 bits.
    """
    return number - 2**32 if number >= 2**31 else number


# What torch.compiler.assume_constant_result sets; calling it would import the compiler, which takes
# seconds, also where nothing is compiled.
purpose_id._dynamo_marked_constant = True  # type: ignore[attr-defined]


def to_uniform(bits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map 32-bit numbers to [0, 1) by their upper 24 bits, which are exact in float32."""
    return (bits >> 8).to(dtype) * 2.0**-24


def to_normal_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Map two 32-bit numbers to two standard normals (Box and Muller 1958), within +-5.77."""
    radius = torch.sqrt(-2.0 * torch.log(to_uniform(a, dtype) + 2.0**-24))
    angle = to_uniform(b, dtype) * (2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def seed_key(seed: int) -> Tensor:
    """Return the key of a 64-bit seed: its lower and upper half, int64 [2]."""
    return torch.tensor([seed & _MASK, (seed >> 32) & _MASK])


@dataclass(frozen=True)
class Draws:
    """Draw numbers for a batch of images.

    `key` and `step` are tensors, so that compiled code serves every seed and step.
    """

    key: Tensor  # int64 [2]: lower and upper 32 bits of the seed
    index: Tensor  # int64 [B]: index of the image in its data set, or of the sample to be made
    step: Tensor  # int64 [B] or []: epoch of a training image, step of a sampler

    @staticmethod
    def of(seed: int, index: Tensor, step: Tensor | int = 0) -> Draws:
        """Return the draws of a 64-bit seed for images at a step or epoch."""
        device = index.device
        key = seed_key(seed).to(device)
        return Draws(key, index, torch.as_tensor(step, dtype=torch.int64, device=device))

    def at(self, step: Tensor | int) -> Draws:
        """Return the same images' draws at another step."""
        step = torch.as_tensor(step, dtype=torch.int64, device=self.index.device)
        return Draws(self.key, self.index, step)

    def part(self, part: slice) -> Draws:
        """Return the draws of some of the images."""
        step = self.step[part] if self.step.ndim else self.step
        return Draws(self.key, self.index[part], step)

    def bits(self, purpose: str, count: int) -> Lanes:
        """Draw `count` 32-bit numbers per image as four lanes, each int64 [B, ceil(count / 4)]."""
        block = torch.arange((count + 3) // 4, device=self.index.device)[None, :]
        step = self.step[:, None] if self.step.ndim else self.step
        counter = (block, self.index[:, None], step, purpose_id(purpose))
        # A number broadcasts as a tensor does.
        return philox(counter, (self.key[0], self.key[1]))  # type: ignore[arg-type]

    def uniform(
        self, purpose: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw uniform numbers in [0, 1), [B, *shape]."""
        lanes = self.bits(purpose, math.prod(shape))
        return self._join_lanes(tuple(to_uniform(lane, dtype) for lane in lanes), shape)

    def normal(
        self, purpose: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw standard normal numbers, [B, *shape]."""
        a, b, c, d = self.bits(purpose, math.prod(shape))
        lanes = (*to_normal_pair(a, b, dtype), *to_normal_pair(c, d, dtype))
        return self._join_lanes(lanes, shape)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Draw one integer in [0, high) per image, int64 [B]; `high` is at most 2^31."""
        first_lane = self.bits(purpose, 1)[0][:, 0]
        return (first_lane * high) >> 32

    def keep_mask(self, purpose: str, shape: tuple[int, ...], drop: float) -> Tensor:
        """Draw a bool mask [B, *shape], False with probability `drop` (rounded to 2^-16)."""
        lanes = self.bits(purpose, (math.prod(shape) + 1) // 2)
        halves = tuple(h for lane in lanes for h in (lane & 0xFFFF, lane >> 16))
        threshold = round(drop * 65536)
        return self._join_lanes(tuple(half >= threshold for half in halves), shape)

    def _join_lanes(self, lanes: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
        # Lane after lane, not interleaved: each lane is then one contiguous store when compiled.
        # A slice that keeps everything is left out: it would cost compiled code a copy.
        count = math.prod(shape)
        flat = torch.cat(lanes, dim=1)
        flat = flat if flat.shape[1] == count else flat[:, :count]
        return flat.reshape(len(self.index), *shape)


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """Return the order of an epoch's images, int64 [length], on the CPU."""
    blocks = range(-(-length // PERMUTATION_BLOCK))
    return torch.cat([permutation_block(seed, epoch, length, block) for block in blocks])


PERMUTATION_BLOCK = 2**16
"""Positions of an epoch that `permutation_block` computes at once."""


def permutation_block(seed: int, epoch: int, length: int, block: int = 0) -> Tensor:
    """Return the images at one block of an epoch's positions, int64, on the CPU.

    The block starts at position `block * PERMUTATION_BLOCK`. Its cost does not grow with `length`.
    A data set of at most one block is sorted by random 63-bit keys. Otherwise each position is
    mapped by itself: a Feistel network (Luby and Rackoff 1988) of eight rounds permutes the
    integers of as few bits as hold `length`, and results of `length` or more are permuted again
    (cycle walking).
    """
    if length <= PERMUTATION_BLOCK:
        draws = Draws.of(seed, torch.arange(length), epoch)
        high, low, *_ = (lane[:, 0] for lane in draws.bits("order", 2))
        return torch.argsort((high << 31) | (low >> 1), stable=True)
    first = block * PERMUTATION_BLOCK
    positions = torch.arange(first, min(first + PERMUTATION_BLOCK, length))
    image = _feistel(seed, epoch, positions, length)
    while len(outside := (image >= length).nonzero()[:, 0]):
        image[outside] = _feistel(seed, epoch, image[outside], length)
    return image


def _feistel(seed: int, epoch: int, number: Tensor, length: int) -> Tensor:
    """Permute integers of as many bits as length - 1 has."""
    bits = (length - 1).bit_length()
    sizes = (bits // 2, bits - bits // 2)
    halves = [number >> sizes[1], number & ((1 << sizes[1]) - 1)]
    for round_ in range(8):
        left, right = round_ % 2, 1 - round_ % 2
        drawn = Draws.of(seed, halves[right], epoch).bits(f"order/{round_}", 1)[0][:, 0]
        halves[left] = halves[left] ^ (drawn & ((1 << sizes[left]) - 1))
    return (halves[0] << sizes[1]) | halves[1]
