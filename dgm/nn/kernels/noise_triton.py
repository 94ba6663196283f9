"""The forward process of diffusion in one kernel, with the same draws as `dgm.rng.Draws`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _philox(key, index, step, purpose, block):
    seed = (tl.load(key + 1) << 32) | tl.load(key)
    none = tl.zeros_like(block).to(tl.uint32)
    return tl.philox(
        seed,
        block.to(tl.uint32),
        none + index.to(tl.uint32),
        none + step.to(tl.uint32),
        none + purpose.to(tl.uint32),
    )


@triton.jit
def _uniform(bits):
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _cosine_and_sine(x):
    """Return cos x and sin x of x in [0, 2 pi), to 1e-7.

    tl.cos and tl.sin take three times the instructions, as each reduces arguments of any size.
    With x = q pi / 2 + r, |r| <= pi / 4, both follow from polynomials of r (Cephes: sinf, cosf).
    """
    q = (x * 0.6366197723675814 + 0.5).to(tl.int32)
    quadrants = q.to(tl.float32)
    r = x - quadrants * 1.5703125  # few bits, so that the product is exact
    r = r - quadrants * 4.837512969970703125e-4
    r = r - quadrants * 7.5497899548918821e-8
    z = r * r
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    cosine = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cosine = cosine * z * z - 0.5 * z + 1.0
    swapped = q % 2 == 1
    c, s = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where((q + 1) & 2 != 0, -c, c), tl.where(q & 2 != 0, -s, s)


@triton.jit
def _normals(a, b):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(a) + 5.9604644775390625e-08))
    cosine, sine = _cosine_and_sine(_uniform(b) * 6.283185307179586)
    return radius * cosine, radius * sine


@triton.jit
def _mirror(element, mirrored, width, CHANNELS: tl.constexpr):
    """Return the offset of `element` in the stored image, mirrored left to right if `mirrored`."""
    position, channel = element // CHANNELS, element % CHANNELS
    row, column = position // width, position % width
    other = (row * width + width - 1 - column) * CHANNELS + channel
    return tl.where(mirrored, other, element)


@triton.jit(
    do_not_specialize=[
        "num_timesteps", "null_label", "width", "for_flip", "for_timestep",
        "for_label_drop", "for_dequantize", "for_noise",
    ],
    do_not_specialize_on_alignment=["images", "labels", "key", "index", "step"],
)  # fmt: skip
def noise(
    images, labels, alphas, sigmas, key, index, step, x_t, target, x_0_out, t, labels_out,
    num_timesteps, label_drop, null_label, width, count, blocks,
    for_flip, for_timestep, for_label_drop, for_dequantize, for_noise,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, STEP_EACH: tl.constexpr, FLIP: tl.constexpr,
    DEQUANTIZE: tl.constexpr, PREDICTION: tl.constexpr, KEEP_X_0: tl.constexpr,
    BIN_WIDTH: tl.constexpr,
):  # fmt: skip
    """Add noise to a part of one of the images, uint8 [B, count] with rows of `width` positions.

    Writes x_t, the target, x_0 if KEEP_X_0, and t and labels_out [B].
    """
    image = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    draw_index = tl.load(index + image)
    draw_step = tl.load(step + (image if STEP_EACH else 0))
    first = tl.zeros([1], tl.int32)

    drawn, _, _, _ = _philox(key, draw_index, draw_step, for_timestep, first)
    level = tl.sum(tl.umulhi(drawn, tl.zeros_like(drawn) + num_timesteps).to(tl.int32), 0)
    alpha, sigma = tl.load(alphas + level), tl.load(sigmas + level)
    mirrored = False
    if FLIP:
        drawn, _, _, _ = _philox(key, draw_index, draw_step, for_flip, first)
        mirrored = tl.sum((drawn >> 31).to(tl.int32), 0) == 1
    if tl.program_id(1) == 0:
        drawn, _, _, _ = _philox(key, draw_index, draw_step, for_label_drop, first)
        dropped = tl.sum((_uniform(drawn) < label_drop).to(tl.int32), 0) == 1
        tl.store(labels_out + image, tl.where(dropped, null_label, tl.load(labels + image)))
        tl.store(t + image, level.to(tl.int64))

    n0, n1, n2, n3 = _philox(key, draw_index, draw_step, for_noise, block)
    if DEQUANTIZE:
        u0, u1, u2, u3 = _philox(key, draw_index, draw_step, for_dequantize, block)
    for lane in tl.static_range(4):
        # As in `Draws`, the four numbers of a Philox block belong to four quarters of the image.
        element = lane * blocks + block
        inside = (block < blocks) & (element < count)
        source = _mirror(element, mirrored, width, CHANNELS) if FLIP else element
        x_0 = tl.load(images + image * count + source, inside, 0).to(tl.float32)
        if DEQUANTIZE:
            u = u0 if lane == 0 else (u1 if lane == 1 else (u2 if lane == 2 else u3))
            x_0 += _uniform(u)
        x_0 = x_0 * BIN_WIDTH - 1.0
        cosine, sine = _normals(n0, n1) if lane < 2 else _normals(n2, n3)
        eps = sine if lane % 2 == 1 else cosine
        noised = alpha * x_0 + sigma * eps  # q_sample
        at = image * count + element
        tl.store(x_t + at, noised.to(x_t.dtype.element_ty), inside)
        predicted = alpha * eps - sigma * x_0  # as `to_prediction`
        if PREDICTION != "v":
            predicted = eps if PREDICTION == "eps" else x_0
        tl.store(target + at, predicted, inside)
        if KEEP_X_0:
            tl.store(x_0_out + at, x_0, inside)
