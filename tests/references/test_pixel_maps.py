"""Grey levels in and out of every family, against the definition of their bins.

Dequantized pixels: level u fills [u / 128 - 1, (u + 1) / 128 - 1) (Theis et al. 2016, "A note on
the evaluation of generative models", section 3.1); others: u / 127.5 - 1, rounded to the nearest
(Ho et al. 2020, section 3.3).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dgm.cli.parser import TRAINERS, family_module, parse
from dgm.diffusion.forward_process import draw_noised
from dgm.images import to_uint8
from dgm.preprocessing import DEQUANTIZED, STANDARD, PixelMap
from dgm.rng import Draws

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
EDGES = {"standard": STANDARD, "dequantized": DEQUANTIZED}
BOTH = pytest.mark.parametrize("pixels", EDGES.values(), ids=EDGES)
VARIANTS = [
    ("diffusion", "", STANDARD),
    ("diffusion", "--diffusion.dequantize", DEQUANTIZED),
    ("gan", "", STANDARD),
    ("vae", "--vae.likelihood=discretized_logistic", STANDARD),
    ("vae", "--vae.likelihood=gaussian", DEQUANTIZED),
    ("flow", "", DEQUANTIZED),
]


def test_every_family_is_among_the_variants() -> None:
    assert {family for family, *_ in VARIANTS} == set(TRAINERS)


@pytest.mark.parametrize(("family", "option", "expected"), VARIANTS)
def test_every_family_restores_every_grey_level(
    family: str, option: str, expected: PixelMap
) -> None:
    module, default = family_module(family), f"{TRAINERS[family]}_tiny.yaml"
    config = parse(module.Config, default, option.split())
    pixels = module.make_parts(config, (32, 32, 3), 10).objective.pixels
    assert pixels == expected
    for dtype in (torch.float32, torch.float64):
        x = pixels.scale(LEVELS, dtype)
        assert torch.equal(pixels.to_uint8(x), LEVELS)
        assert np.array_equal(to_uint8(x, pixels), LEVELS.numpy())
        # A value anywhere in a bin gives its level; only at the very edges rounding decides.
        for within in (-0.499, 0.499):
            assert torch.equal(pixels.to_uint8(x + within * pixels.bin_width), LEVELS)


def test_bins_are_those_of_the_papers() -> None:
    u = np.arange(256.0)
    x = DEQUANTIZED.scale(LEVELS, torch.float64).flatten().numpy()
    np.testing.assert_allclose(x, (u / 128 - 1 + (u + 1) / 128 - 1) / 2, rtol=0, atol=1e-15)
    x = STANDARD.scale(LEVELS, torch.float64).flatten().numpy()
    np.testing.assert_allclose(x, 2 * u / 255 - 1, rtol=0, atol=1e-15)
    assert x[0] == -1 and x[255] == 1
    assert (STANDARD.bin_width, DEQUANTIZED.bin_width) == (2 / 255, 1 / 128)


def test_to_uint8_takes_the_bin_of_each_value() -> None:
    x = torch.linspace(-1.2, 1.2, 10_007, dtype=torch.float64)
    by_floor = np.floor((x.numpy() + 1) * 128).clip(0, 255)
    by_rounding = np.round((x.numpy().clip(-1, 1) + 1) * 127.5)
    for pixels, expected in ((DEQUANTIZED, by_floor), (STANDARD, by_rounding)):
        found = pixels.to_uint8(x.reshape(1, 1, 1, -1)).flatten().numpy()
        assert np.array_equal(found, expected)


@BOTH
def test_dequantized_images_fill_their_bins_and_come_back_on_average(pixels: PixelMap) -> None:
    count = 4000
    images = LEVELS.expand(count, -1, -1, -1)
    x = pixels.dequantize(images, Draws.of(0, torch.arange(count)), torch.float64)
    middle = pixels.scale(LEVELS, torch.float64)
    away = (x - middle) / pixels.bin_width
    assert away.min() >= -0.5 - 1e-9 and away.max() < 0.5 + 1e-9
    # Uniform: mean 0, variance 1/12; five standard errors over all levels and over each.
    assert abs(float(away.mean())) < 5 / math.sqrt(12 * away.numel())
    assert float(away.var()) == pytest.approx(1 / 12, abs=5 / math.sqrt(180 * away.numel()))
    assert float(away.mean(0).abs().max()) < 5 / math.sqrt(12 * count)
    assert torch.equal(pixels.to_uint8(x), images)
    levels = pixels.to_uint8(x).double().mean(0) - LEVELS[0]
    assert not levels.any()  # no level is lighter or darker than it went in


def test_noising_scales_as_the_map_does() -> None:
    images = LEVELS.expand(3, -1, -1, 3)
    draws = Draws.of(0, torch.arange(3))
    for dequantize, pixels in ((False, STANDARD), (True, DEQUANTIZED)):
        one = torch.ones(3, 1, 1, 1)
        x_0 = draw_noised(images, one, 0 * one, draws, dequantize).x_0
        expected = pixels.dequantize(images, draws) if dequantize else pixels.scale(images)
        assert torch.equal(x_0, expected) and torch.equal(pixels.to_uint8(x_0), images)


@BOTH
@pytest.mark.parametrize("to", EDGES.values(), ids=EDGES)
def test_converted_images_have_the_same_levels(pixels: PixelMap, to: PixelMap) -> None:
    x = pixels.scale(LEVELS, torch.float64)
    torch.testing.assert_close(
        pixels.convert(x, to), to.scale(LEVELS, torch.float64), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_it_is_rounded(dtype: torch.dtype) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 0.25], dtype=dtype).reshape(1, 1, 1, 4)
    assert STANDARD.to_uint8(x).flatten().tolist() == [0, 128, 255, 159]
    assert DEQUANTIZED.to_uint8(x).flatten().tolist() == [0, 128, 255, 160]
