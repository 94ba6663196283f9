"""GroupNorm, scale and shift, SiLU and dropout over [B, positions, C] memory, in one kernel.

A second kernel is its backward pass. A program normalizes some whole groups of channels of one
image, eight tiles at a time, one from each eighth of the positions. If these eight cover the image
(WHOLE), x is read once and kept in registers; else a second pass reads it again, mostly from the
cache. Sums are accumulated by each thread and reduced once, after the loop.

The positions are split into eight equal segments: the eight 16-bit halves of one Philox block
decide the dropout of one element in each (`Draws.keep_mask`), so one byte holds the dropout bits of
eight elements. `load_tiles` returns a tuple of eight tiles [ROWS, CHANNELS], fp32, one of each
segment.

With JOINED the channels from `channels_of_x` on are those of a second tensor, `skip`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter does not support inline assembly.
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
# Not specialized on divisibility by 16, which would recompile kernels for other addresses.
_DRAWS = ["key", "index", "step"]


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
    # Programs of one image are adjacent, since they share cache lines. The grid is one-dimensional,
    # since the other dimensions are limited to 65,535.
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
    """Load the values of [B, C] for the channels of an image, fp32."""
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
    width, of_x = channels, inside
    if JOINED:
        width, rest = channels_of_x, channels - channels_of_x
        of_x = inside & (channel // ALIGN < width // ALIGN)
        of_skip = (inside & (channel // ALIGN >= width // ALIGN))[None, :]
        other = skip + image * 8 * segment * rest
        other += row[:, None] * rest + (channel - width)[None, :]
    at = x + image * 8 * segment * width
    at += row[:, None] * width + channel[None, :]
    for s in tl.static_range(8):
        value = tl.load(at + s * segment * width, of_x[None, :], 0.0).to(tl.float32)
        if JOINED:
            value += tl.load(other + s * segment * rest, of_skip, 0.0).to(tl.float32)
        tiles = tiles + (value + more[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def store_tile(
    value, s, x, skip, image, segment, row, channels, channels_of_x, channel, inside,
    ALIGN: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Store the tile of segment `s` where `load_tiles` loads it."""
    value = value.to(x.dtype.element_ty)
    position = image * 8 * segment + s * segment
    width, of_x = channels, inside
    if JOINED:
        width, rest = channels_of_x, channels - channels_of_x
        of_x = inside & (channel // ALIGN < width // ALIGN)
        of_skip = (inside & (channel // ALIGN >= width // ALIGN))[None, :]
        at = row[:, None] * rest + (channel - width)[None, :]
        tl.store(skip + position * rest + at, value, of_skip)
    at = row[:, None] * width + channel[None, :]
    tl.store(x + position * width + at, value, of_x[None, :])


@triton.jit
def draw_mask(
    mask, key, index, step, image, purpose, threshold, segment, channels, row, channel, inside,
    STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Write and return the mask of kept elements, [ROWS, CHANNELS]; bit s is that of segment s."""
    seed = (tl.load(key + 1) << 32) | tl.load(key)
    draw_index = tl.load(index + image).to(tl.uint32)
    draw_step = tl.load(step + (image if STEP_EACH else 0)).to(tl.uint32)
    block = (row[:, None] * channels + channel[None, :]).to(tl.uint32)
    none = tl.zeros_like(block)
    lanes = tl.philox(
        seed, block, none + draw_index, none + draw_step, none + purpose.to(tl.uint32)
    )
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
def squares_of_eight(tiles, center):
    """Return the sum of (tile - center)^2 over eight tiles; `center` broadcasts."""
    total = (tiles[0] - center) * (tiles[0] - center)
    for s in tl.static_range(1, 8):
        total += (tiles[s] - center) * (tiles[s] - center)
    return total


@triton.jit
def sum_of_products(tiles, others):
    """Return the sum of tile * other over eight pairs of tiles."""
    total = tiles[0] * others[0]
    for s in tl.static_range(1, 8):
        total += tiles[s] * others[s]
    return total


@triton.jit
def _finish(
    tiles, kept, y, image, segment, row, channels, channel, inside, gain, offset, keep_factor,
    ALIGN: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Write y = silu(gain x + offset), with dropout."""
    for s in tl.static_range(8):
        z = tiles[s] * gain[None, :] + offset[None, :]
        if SILU:
            z = z * sigmoid(z)
        if DROP:
            z = drop(z, kept, s, keep_factor)
        store_tile(
            z, s, y, y, image, segment, row, channels, channels, channel, inside, ALIGN, False
        )


@triton.jit
def _moments_multi(
    x, more, image, segment, channels, channel, inside,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Return the mean of each channel's group and the channel's sum of squared deviations from it.

    Both over many tiles, each [CHANNELS].
    """
    row = tl.arange(0, ROWS)
    # At each element of a tile, moments over the segments and tiles so far (Chan et al. 1983).
    center = tl.zeros([ROWS, CHANNELS], tl.float32)
    spread = tl.zeros([ROWS, CHANNELS], tl.float32)
    count = 0.0
    for first in range(0, segment, ROWS):
        tiles = load_tiles(
            x, x, more, image, segment, first + row, channels, channels, channel, inside, ALIGN,
            False,
        )  # fmt: skip
        own = sum_of_eight(tiles) * 0.125
        fraction = 1.0 / (count + 1.0)
        delta = own - center
        spread += squares_of_eight(tiles, own) + delta * delta * (8.0 * count * fraction)
        center += delta * fraction
        count += 1.0
    total = tl.sum(center, 0) * (8.0 * count)
    group_mean = sum_of_group(total, inside, GROUP, CHANNELS) / (8 * segment * GROUP).to(tl.float32)
    delta = center - group_mean[None, :]
    return group_mean, tl.sum(spread + delta * delta * (8.0 * count), 0)


@triton.jit
def _finish_multi(
    x, more, mask, key, index, step, y, image, segment, channels, channel, inside,
    gain, b, keep_factor, purpose, threshold,
    ROWS: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
    DROP: tl.constexpr, STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Write y and the mask of many tiles."""
    row = tl.arange(0, ROWS)
    for first in range(0, segment, ROWS):
        drawn = None
        if DROP:
            drawn = draw_mask(
                mask, key, index, step, image, purpose, threshold, segment, channels,
                first + row, channel, inside, STEP_EACH,
            )  # fmt: skip
        again = load_tiles(
            x, x, more, image, segment, first + row, channels, channels, channel, inside, ALIGN,
            False,
        )  # fmt: skip
        _finish(
            again, drawn, y, image, segment, first + row, channels, channel, inside, gain, b,
            keep_factor, ALIGN, SILU, DROP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["segment", "purpose", "threshold"], do_not_specialize_on_alignment=_DRAWS
)
def forward(
    x, skip, added, weight, bias, scale, shift, key, index, step, y, mean, rstd, mask,
    segment, channels, channels_of_x, eps, purpose, threshold, keep_factor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, JOINED: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_SCALE: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr, STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Write y [B, 8 segment, C], the mask [B, segment, C], and mean and rstd [B, groups]."""
    image, channel, inside = own_channels(channels, GROUP, ALIGN, CHANNELS)
    row = tl.arange(0, ROWS)
    more = tl.zeros([CHANNELS], tl.float32)
    if HAS_ADDED:
        more += per_channel(added, image, channels, channel, inside)
    number = (8 * segment * GROUP).to(tl.float32)
    if WHOLE:
        kept = None
        if DROP:  # before x is loaded, to save registers
            kept = draw_mask(
                mask, key, index, step, image, purpose, threshold, segment, channels, row, channel,
                inside, STEP_EACH,
            )  # fmt: skip
        tiles = load_tiles(
            x, skip, more, image, segment, row, channels, channels_of_x, channel, inside, ALIGN,
            JOINED,
        )  # fmt: skip
        total = tl.sum(sum_of_eight(tiles), 0)
        group_mean = sum_of_group(total, inside, GROUP, CHANNELS) / number
        squares = tl.sum(squares_of_eight(tiles, group_mean[None, :]), 0)
    else:
        group_mean, squares = _moments_multi(
            x, more, image, segment, channels, channel, inside, GROUP, ROWS, CHANNELS, ALIGN
        )  # fmt: skip
    variance = sum_of_group(squares, inside, GROUP, CHANNELS) / number
    inverse = 1.0 / tl.sqrt(variance + eps)
    groups = channels // GROUP
    is_first = inside & (channel % GROUP == 0)
    tl.store(mean + image * groups + channel // GROUP, group_mean, is_first)
    tl.store(rstd + image * groups + channel // GROUP, inverse, is_first)

    g, b = gain_and_offset(weight, bias, scale, shift, image, channels, channel, inside, HAS_SCALE)
    gain = inverse * g
    if WHOLE:
        _finish(
            tiles, kept, y, image, segment, row, channels, channel, inside, gain,
            b - group_mean * gain, keep_factor, ALIGN, SILU, DROP,
        )  # fmt: skip
    else:
        _finish_multi(
            x, more - group_mean, mask, key, index, step, y, image, segment, channels, channel,
            inside, gain, b, keep_factor, purpose, threshold, ROWS, ALIGN, SILU, DROP, STEP_EACH,
        )  # fmt: skip


@triton.jit
def _load_both(
    x, skip, grad, mask, image, segment, row, channels, channels_of_x, channel, inside,
    more, gain, offset, keep_factor,
    ALIGN: tl.constexpr, JOINED: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Return the tiles of u = x + more, centered, and of the gradient of z."""
    u = load_tiles(
        x, skip, more, image, segment, row, channels, channels_of_x, channel, inside, ALIGN, JOINED
    )
    if DROP:
        byte = image * segment * channels + row[:, None] * channels + channel[None, :]
        kept = tl.load(mask + byte, inside[None, :], 0).to(tl.uint32)
    at = grad + image * 8 * segment * channels
    at += row[:, None] * channels + channel[None, :]
    gradients = ()
    for s in tl.static_range(8):
        dz = tl.load(at + s * segment * channels, inside[None, :], 0.0).to(tl.float32)
        if DROP:
            dz = drop(dz, kept, s, keep_factor)
        if SILU:
            z = u[s] * gain[None, :] + offset[None, :]
            s_z = sigmoid(z)
            dz = dz * s_z * (1.0 + z * (1.0 - s_z))
        gradients = gradients + (dz,)  # type: ignore[assignment]  # noqa: RUF005
    return u, gradients


@triton.jit
def _sums_multi(
    x, grad, mask, image, segment, channels, channel, inside, more, gain, b, keep_factor,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Return sums of dz, dz u and u over many tiles, each [ROWS, CHANNELS]."""
    row = tl.arange(0, ROWS)
    sum_1 = tl.zeros([ROWS, CHANNELS], tl.float32)
    sum_u = tl.zeros([ROWS, CHANNELS], tl.float32)
    sum_3 = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, segment, ROWS):
        centered, by_z = _load_both(
            x, x, grad, mask, image, segment, first + row, channels, channels, channel, inside,
            more, gain, b, keep_factor, ALIGN, False, SILU, DROP,
        )  # fmt: skip
        sum_1 += sum_of_eight(by_z)
        sum_u += sum_of_products(by_z, centered)
        sum_3 += sum_of_eight(centered)
    return sum_1, sum_u, sum_3


@triton.jit
def _write_gradient(
    u, dz, dx, d_skip, image, segment, row, channels, channels_of_x, channel, inside,
    gain, slope, constant, ALIGN: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    for s in tl.static_range(8):
        du = gain[None, :] * dz[s] - slope[None, :] * u[s] - constant[None, :]
        store_tile(
            du, s, dx, d_skip, image, segment, row, channels, channels_of_x, channel, inside,
            ALIGN, JOINED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["segment"])
def backward(
    x, skip, added, weight, bias, scale, shift, mask, mean, rstd, grad,
    dx, d_skip, sum_dz, sum_dz_x_hat, sum_du,
    segment, channels, channels_of_x, keep_factor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, JOINED: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_SCALE: tl.constexpr,
    SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Write dx (and d_skip), and the sums over positions of dz, dz x_hat and du, each [B, C]."""
    image, channel, inside = own_channels(channels, GROUP, ALIGN, CHANNELS)
    row = tl.arange(0, ROWS)
    groups = channels // GROUP
    inverse = tl.load(rstd + image * groups + channel // GROUP, inside, 0.0)
    more = -tl.load(mean + image * groups + channel // GROUP, inside, 0.0)
    if HAS_ADDED:
        more += per_channel(added, image, channels, channel, inside)
    g, b = gain_and_offset(weight, bias, scale, shift, image, channels, channel, inside, HAS_SCALE)
    gain = inverse * g
    if WHOLE:
        u, dz = _load_both(
            x, skip, grad, mask, image, segment, row, channels, channels_of_x, channel, inside,
            more, gain, b, keep_factor, ALIGN, JOINED, SILU, DROP,
        )  # fmt: skip
        sum_1, sum_u, sum_3 = sum_of_eight(dz), sum_of_products(dz, u), sum_of_eight(u)
    else:
        sum_1, sum_u, sum_3 = _sums_multi(
            x, grad, mask, image, segment, channels, channel, inside, more, gain, b, keep_factor,
            ROWS, CHANNELS, ALIGN, SILU, DROP,
        )  # fmt: skip
    by_one = tl.sum(sum_1, 0)
    by_x_hat = tl.sum(sum_u, 0) * inverse
    at = image * channels + channel
    tl.store(sum_dz + at, by_one, inside)
    tl.store(sum_dz_x_hat + at, by_x_hat, inside)

    # du = rstd (g dz - mean(g dz) - x_hat mean(g dz x_hat)), means over a group
    positions = (8 * segment).to(tl.float32)
    number = positions * GROUP
    constant = inverse * sum_of_group(g * by_one, inside, GROUP, CHANNELS) / number
    slope = sum_of_group(g * by_x_hat, inside, GROUP, CHANNELS) / number * inverse * inverse
    if HAS_ADDED:
        whole = gain * by_one - positions * constant - slope * tl.sum(sum_3, 0)
        tl.store(sum_du + at, whole, inside)
    if WHOLE:
        _write_gradient(
            u, dz, dx, d_skip, image, segment, row, channels, channels_of_x, channel, inside,
            gain, slope, constant, ALIGN, JOINED,
        )  # fmt: skip
    else:
        for first in range(0, segment, ROWS):
            centered, by_z = _load_both(
                x, x, grad, mask, image, segment, first + row, channels, channels, channel, inside,
                more, gain, b, keep_factor, ALIGN, False, SILU, DROP,
            )  # fmt: skip
            _write_gradient(
                centered, by_z, dx, dx, image, segment, first + row, channels, channels, channel,
                inside, gain, slope, constant, ALIGN, False,
            )  # fmt: skip
