"""Parts of an image of [positions, C] memory, as the norm kernels read and write them.

The positions are taken as eight equal segments, since the eight 16-bit halves of one Philox block
drop one element of each (`Draws.keep_mask`), so that one byte holds the dropout bits of eight
elements. `load_tiles` returns a tuple of eight tiles [ROWS, CHANNELS], fp32, one of each segment.

With JOINED the channels from `channels_of_x` on are those of a second tensor, `skip`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter knows no inline assembly.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)) to 2^-21; a third of the instructions of tl.sigmoid.

    The difference is the handling of subnormal numbers, which no result here depends on.
    """
    if INTERPRETED:
        y = tl.sigmoid(x)
    else:
        y = tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.ftz.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.ftz.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return y


@triton.jit
def own_channels(channels, GROUP: tl.constexpr, ALIGN: tl.constexpr, CHANNELS: tl.constexpr):
    """Return this program's image and channels, and which of them exist, each [CHANNELS]."""
    width: tl.constexpr = CHANNELS // GROUP * GROUP
    # Programs of one image run together, as they share lines of the cache; in one dimension of the
    # grid, since the others end at 65,535.
    programs = (channels + width - 1) // width
    image, part = tl.program_id(0) // programs, tl.program_id(0) % programs
    lane = tl.arange(0, CHANNELS)
    channel = tl.multiple_of(part * width, ALIGN) + lane
    # Compared by whole vectors, so that loads and stores stay vectorized.
    inside = (lane // ALIGN < width // ALIGN) & (channel // ALIGN < channels // ALIGN)
    return image.to(tl.int64), channel, inside


@triton.jit
def sum_of_group(value, inside, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Return at each channel the sum of `value` [CHANNELS] over the channels of its group."""
    group = tl.arange(0, CHANNELS) // GROUP
    same = (group[:, None] == group[None, :]) & inside[None, :]
    return tl.sum(tl.where(same, value[None, :], 0.0), 1)


@triton.jit
def per_channel(pointer, image, channels, channel, inside):
    """Load what [B, C] holds for the channels of an image, fp32."""
    return tl.load(pointer + image * channels + channel, inside, 0.0).to(tl.float32)


@triton.jit
def gain_and_offset(
    weight, bias, scale, shift, image, channels, channel, inside, HAS_SCALE: tl.constexpr
):  # fmt: skip
    """Return g and b [CHANNELS] of z = g x_hat + b."""
    w = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    b = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + per_channel(scale, image, channels, channel, inside)
        w, b = w * factor, b * factor + per_channel(shift, image, channels, channel, inside)
    return w, b


@triton.jit
def load_tiles(
    x, skip, more, image, segment, row, channels, channels_of_x, channel, inside,
    ALIGN: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Return the tiles of x, or of x and skip joined, plus `more` [CHANNELS]."""
    tiles = ()
    if JOINED:
        first_of_skip = channels_of_x // ALIGN
        rest = channels - channels_of_x
        of_x = (inside & (channel // ALIGN < first_of_skip))[None, :]
        of_skip = (inside & (channel // ALIGN >= first_of_skip))[None, :]
        at = x + image * 8 * segment * channels_of_x
        at += row[:, None] * channels_of_x + channel[None, :]
        other = skip + image * 8 * segment * rest
        other += row[:, None] * rest + (channel - channels_of_x)[None, :]
        for s in tl.static_range(8):
            value = tl.load(at + s * segment * channels_of_x, of_x, 0.0).to(tl.float32)
            value += tl.load(other + s * segment * rest, of_skip, 0.0).to(tl.float32)
            tiles = tiles + (value + more[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    else:
        at = x + image * 8 * segment * channels
        at += row[:, None] * channels + channel[None, :]
        for s in tl.static_range(8):
            value = tl.load(at + s * segment * channels, inside[None, :], 0.0).to(tl.float32)
            tiles = tiles + (value + more[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def store_tile(
    value, s, x, skip, image, segment, row, channels, channels_of_x, channel, inside,
    ALIGN: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Store the tile of segment `s` where `load_tiles` found it."""
    value = value.to(x.dtype.element_ty)
    place = image * 8 * segment + s * segment
    if JOINED:
        first_of_skip = channels_of_x // ALIGN
        rest = channels - channels_of_x
        of_x = (inside & (channel // ALIGN < first_of_skip))[None, :]
        of_skip = (inside & (channel // ALIGN >= first_of_skip))[None, :]
        at = row[:, None] * channels_of_x + channel[None, :]
        tl.store(x + place * channels_of_x + at, value, of_x)
        at = row[:, None] * rest + (channel - channels_of_x)[None, :]
        tl.store(skip + place * rest + at, value, of_skip)
    else:
        at = row[:, None] * channels + channel[None, :]
        tl.store(x + place * channels + at, value, inside[None, :])


@triton.jit
def draw_mask(
    mask, key, index, step, image, purpose, threshold, segment, channels, row, channel, inside,
    STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Write and return what is kept, [ROWS, CHANNELS]: bit s is that of segment s."""
    seed = (tl.load(key + 1) << 32) | tl.load(key)
    which = tl.load(index + image).to(tl.uint32)
    when = tl.load(step + (image if STEP_EACH else 0)).to(tl.uint32)
    block = (row[:, None] * channels + channel[None, :]).to(tl.uint32)
    none = tl.zeros_like(block)
    lanes = tl.philox(seed, block, none + which, none + when, none + purpose.to(tl.uint32))
    kept = none
    for lane in tl.static_range(4):
        # Low and high half of each lane in turn.
        kept |= ((lanes[lane] & 0xFFFF) >= threshold).to(tl.uint32) << (2 * lane)
        kept |= ((lanes[lane] >> 16) >= threshold).to(tl.uint32) << (2 * lane + 1)
    byte = image * segment * channels + row[:, None] * channels + channel[None, :]
    tl.store(mask + byte, kept.to(tl.uint8), inside[None, :])
    return kept


@triton.jit
def drop(value, kept, s, keep_factor):
    """Apply dropout to the tile of segment `s`."""
    return tl.where(((kept >> s) & 1) != 0, value * keep_factor, 0.0)


@triton.jit
def sum_of_eight(tiles):
    """Return the sum of eight tiles."""
    total = tiles[0]
    for s in tl.static_range(1, 8):
        total += tiles[s]
    return total


@triton.jit
def squares_of_eight(tiles, centre):
    """Return the sum of squares of eight tiles less `centre`, which broadcasts."""
    total = (tiles[0] - centre) * (tiles[0] - centre)
    for s in tl.static_range(1, 8):
        total += (tiles[s] - centre) * (tiles[s] - centre)
    return total


@triton.jit
def sum_of_products(tiles, others):
    """Return the sum of the products of two times eight tiles."""
    total = tiles[0] * others[0]
    for s in tl.static_range(1, 8):
        total += tiles[s] * others[s]
    return total
