"""GroupNorm, scale and shift, SiLU and dropout over [B, places, C] memory, one kernel each way.

A program holds some whole groups of one image and goes over the places twice; the second time they
come from the cache. All sums are fp32. The places are taken as eight equal segments, since the
eight 16-bit halves of one Philox block drop one number of each (`Draws.keep_mask`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _per_channel(pointer, image, channels, channel, inside):
    return tl.load(pointer + image * channels + channel, inside, 0.0).to(tl.float32)


@triton.jit
def _held(
    added, channels, groups,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HELD: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    """Give the image and groups of this program, their channels and what is added to each."""
    image = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * HELD + tl.arange(0, HELD)
    lane = tl.arange(0, GROUP_P2)
    channel = group[:, None] * GROUP + lane[None, :]
    inside = (group[:, None] < groups) & (lane[None, :] < GROUP)
    more = tl.zeros([HELD, GROUP_P2], tl.float32)
    if HAS_ADDED:
        more += _per_channel(added, image, channels, channel, inside)
    return image, group, channel, inside, more


@triton.jit
def _affine(
    weight, bias, scale, shift, image, channels, channel, inside, HAS_SCALE: tl.constexpr
):  # fmt: skip
    """Give weight, bias and 1 + scale of each channel, [groups, channels of a group]."""
    w = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    b = tl.load(bias + channel, inside, 0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + _per_channel(scale, image, channels, channel, inside)
        moved = _per_channel(shift, image, channels, channel, inside)
    else:
        factor = tl.zeros_like(w) + 1.0
        moved = tl.zeros_like(w)
    return w, b, factor, moved


@triton.jit
def _bits(key, index, step, image, STEP_EACH: tl.constexpr, purpose, block):
    """Draw the four lanes of Philox for counters `block` of an image."""
    seed = (tl.load(key + 1) << 32) | tl.load(key)
    which = tl.load(index + image).to(tl.uint32)
    when = tl.load(step + (image if STEP_EACH else 0)).to(tl.uint32)
    none = tl.zeros_like(block).to(tl.uint32)
    counter = block.to(tl.uint32)
    return tl.philox(seed, counter, none + which, none + when, none + purpose.to(tl.uint32))


@triton.jit
def _half(a, b, c, d, SEGMENT: tl.constexpr):
    """Give the 16-bit number of a segment: low and high halves of the four lanes in turn."""
    if SEGMENT // 2 == 0:
        lane = a
    elif SEGMENT // 2 == 1:
        lane = b
    elif SEGMENT // 2 == 2:
        lane = c
    else:
        lane = d
    return ((lane >> 16) if SEGMENT % 2 == 1 else (lane & 0xFFFF)).to(tl.int32)


@triton.jit
def _moments(
    x, more, start, places, channels, channel, inside, eps, GROUP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Give mean and inverse deviation of each group of x + more.

    Moments of each channel, tile by tile (Chan et al. 1983), so that nothing cancels.
    """
    centre = tl.zeros_like(more)
    spread = tl.zeros_like(more)
    count = 0.0
    for first in range(0, places, ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row < places)[:, None, None] & inside[None, :, :]
        at = start + row[:, None, None] * channels + channel[None, :, :]
        u = tl.load(x + at, here, 0.0).to(tl.float32) + more[None, :, :]
        size = tl.minimum(places - first, ROWS).to(tl.float32)
        own = tl.sum(tl.where(here, u, 0.0), 0) / size
        off = tl.where(here, u - own[None, :, :], 0.0)
        apart = own - centre
        spread += tl.sum(off * off, 0) + apart * apart * (count * size / (count + size))
        centre += apart * (size / (count + size))
        count += size
    middle = tl.sum(tl.where(inside, centre, 0.0), 1) / GROUP
    apart = tl.where(inside, centre - middle[:, None], 0.0)
    total = tl.sum(tl.where(inside, spread, 0.0), 1) + places * tl.sum(apart * apart, 1)
    return middle, 1.0 / tl.sqrt(total / (places * GROUP) + eps)


@triton.jit
def forward(
    x, added, weight, bias, scale, shift, key, index, step, y, mean, rstd,
    segment, channels, groups, eps, purpose, threshold, keep_factor,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr,
    HAS_ADDED: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr,
    DROP: tl.constexpr, STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Write y [B, 8 segment, C], and mean and rstd [B, groups] of u = x + added."""
    image, group, channel, inside, more = _held(
        added, channels, groups, GROUP, GROUP_P2, HELD, HAS_ADDED
    )
    places = 8 * segment
    start = image * places * channels

    middle, inverse = _moments(x, more, start, places, channels, channel, inside, eps, GROUP, ROWS)
    tl.store(mean + image * groups + group, middle, group < groups)
    tl.store(rstd + image * groups + group, inverse, group < groups)

    w, b, factor, moved = _affine(
        weight, bias, scale, shift, image, channels, channel, inside, HAS_SCALE
    )
    gain = inverse[:, None] * w * factor
    offset = (more - middle[:, None]) * gain + b * factor + moved
    for first in range(0, segment, ROWS // 8):
        row = first + tl.arange(0, ROWS // 8)
        here = (row < segment)[:, None, None] & inside[None, :, :]
        block = row[:, None, None] * channels + channel[None, :, :]
        if DROP:
            b0, b1, b2, b3 = _bits(key, index, step, image, STEP_EACH, purpose, block)
        for s in tl.static_range(8):
            at = start + s * segment * channels + block
            z = tl.load(x + at, here, 0.0).to(tl.float32) * gain[None, :, :] + offset[None, :, :]
            if SILU:
                z = z * tl.sigmoid(z)
            if DROP:
                z = tl.where(_half(b0, b1, b2, b3, s) >= threshold, z * keep_factor, 0.0)
            tl.store(y + at, z.to(y.dtype.element_ty), here)


@triton.jit
def _gradient_at(
    x, grad, at, here, kept, gain, offset, keep_factor, SILU: tl.constexpr, DROP: tl.constexpr
):  # fmt: skip
    """Give x and the gradient of z at some places, fp32."""
    value = tl.load(x + at, here, 0.0).to(tl.float32)
    dz = tl.load(grad + at, here, 0.0).to(tl.float32)
    if DROP:
        dz = tl.where(kept, dz * keep_factor, 0.0)
    if SILU:
        z = value * gain[None, :, :] + offset[None, :, :]
        share = tl.sigmoid(z)
        dz = dz * share * (1.0 + z * (1.0 - share))
    return value, dz


@triton.jit
def _sums(
    x, grad, key, index, step, image, purpose, threshold, keep_factor, start, segment, channels,
    channel, inside, gain, offset, inverse, shifted,
    ROWS: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr, STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Sum dz, dz x_hat and x_hat over places, for each channel."""
    sum_1 = tl.zeros_like(gain)
    sum_2 = tl.zeros_like(gain)
    sum_3 = tl.zeros_like(gain)
    for first in range(0, segment, ROWS // 8):
        row = first + tl.arange(0, ROWS // 8)
        here = (row < segment)[:, None, None] & inside[None, :, :]
        block = row[:, None, None] * channels + channel[None, :, :]
        if DROP:
            b0, b1, b2, b3 = _bits(key, index, step, image, STEP_EACH, purpose, block)
        for s in tl.static_range(8):
            at = start + s * segment * channels + block
            kept = (_half(b0, b1, b2, b3, s) >= threshold) if DROP else here
            value, dz = _gradient_at(x, grad, at, here, kept, gain, offset, keep_factor, SILU, DROP)
            x_hat = tl.where(here, value * inverse[None, :, :] + shifted[None, :, :], 0.0)
            sum_1 += tl.sum(dz, 0)
            sum_2 += tl.sum(dz * x_hat, 0)
            sum_3 += tl.sum(x_hat, 0)
    return sum_1, sum_2, sum_3


@triton.jit
def backward(
    x, added, weight, bias, scale, shift, key, index, step, mean, rstd, grad,
    dx, sum_dz, sum_dz_x_hat, sum_du,
    segment, channels, groups, purpose, threshold, keep_factor,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HELD: tl.constexpr, ROWS: tl.constexpr,
    HAS_ADDED: tl.constexpr, HAS_SCALE: tl.constexpr, SILU: tl.constexpr,
    DROP: tl.constexpr, STEP_EACH: tl.constexpr,
):  # fmt: skip
    """Write dx, and the sums over places that the other gradients are made of, each [B, C]."""
    image, group, channel, inside, more = _held(
        added, channels, groups, GROUP, GROUP_P2, HELD, HAS_ADDED
    )
    places = 8 * segment
    start = image * places * channels
    middle = tl.load(mean + image * groups + group, group < groups, 0.0)[:, None]
    inverse = tl.load(rstd + image * groups + group, group < groups, 0.0)[:, None]
    w, b, factor, moved = _affine(
        weight, bias, scale, shift, image, channels, channel, inside, HAS_SCALE
    )
    gain = inverse * w * factor
    offset = (more - middle) * gain + b * factor + moved
    # x_hat = value * inverse + shifted
    shifted = (more - middle) * inverse

    sum_1, sum_2, sum_3 = _sums(
        x, grad, key, index, step, image, purpose, threshold, keep_factor, start, segment, channels,
        channel, inside, gain, offset, inverse, shifted, ROWS, SILU, DROP, STEP_EACH,
    )  # fmt: skip
    own = image * channels + channel
    tl.store(sum_dz + own, sum_1, inside)
    tl.store(sum_dz_x_hat + own, sum_2, inside)

    # du = rstd (g dz - mean(g dz) - x_hat mean(g dz x_hat)), g = weight (1 + scale), over a group
    g = w * factor
    number = places * GROUP
    mean_1 = (tl.sum(tl.where(inside, g * sum_1, 0.0), 1) / number)[:, None]
    mean_2 = (tl.sum(tl.where(inside, g * sum_2, 0.0), 1) / number)[:, None]
    if HAS_ADDED:
        whole = inverse * (g * sum_1 - places * mean_1 - sum_3 * mean_2)
        tl.store(sum_du + own, whole, inside)
    for first in range(0, segment, ROWS // 8):
        row = first + tl.arange(0, ROWS // 8)
        here = (row < segment)[:, None, None] & inside[None, :, :]
        block = row[:, None, None] * channels + channel[None, :, :]
        if DROP:
            b0, b1, b2, b3 = _bits(key, index, step, image, STEP_EACH, purpose, block)
        for s in tl.static_range(8):
            at = start + s * segment * channels + block
            kept = (_half(b0, b1, b2, b3, s) >= threshold) if DROP else here
            value, dz = _gradient_at(x, grad, at, here, kept, gain, offset, keep_factor, SILU, DROP)
            x_hat = value * inverse[None, :, :] + shifted[None, :, :]
            du = inverse[None] * (g[None] * dz - mean_1[None] - x_hat * mean_2[None])
            tl.store(dx + at, du.to(dx.dtype.element_ty), here)
