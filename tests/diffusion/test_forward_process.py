"""ForwardProcess: what is drawn once per image, and x_t from stored pixels."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm.diffusion.forward_process import (
    Example,
    ForwardProcess,
    PerImageDraws,
    draw_noised,
    draw_per_image,
)
from dgm.diffusion.parameterization import to_x_0_and_eps
from dgm.diffusion.schedule import linear
from dgm.preprocessing import flip_images
from dgm.rng import Draws


def pixels(count: int, size: int = 8) -> Tensor:
    return Draws.of(9, torch.arange(count)).uniform("noise", (size, size, 3)).mul(256).byte()


def drawn(index: Tensor, label_drop: float = 0.1) -> PerImageDraws:
    schedule, draws = linear(100), Draws.of(0, index, 1)
    return draw_per_image(index % 10, schedule.alphas, schedule.sigmas, draws, label_drop, 10)


def test_noise_has_the_moments_of_a_normal():
    images, alpha = pixels(64, 32), torch.full((64, 1, 1, 1), 0.6).double()
    x_t, x_0, eps = draw_noised(images, alpha, 0.8 + 0 * alpha, Draws.of(0, torch.arange(64)))
    n = eps.numel()
    assert abs(float(eps.mean())) < 4 / math.sqrt(n)
    assert abs(float(eps.var()) - 1) < 4 * math.sqrt(2 / n)
    # Noise is not correlated with the image, nor with that of the next image.
    pairs = torch.corrcoef(torch.stack([eps[:-1].flatten(), x_0[:-1].flatten(), eps[1:].flatten()]))
    assert float(pairs.fill_diagonal_(0).abs().max()) < 4.5 / math.sqrt(n)
    assert abs(float(x_t.var()) - (0.36 * float(x_0.var()) + 0.64)) < 0.01  # 9 standard errors


def test_half_of_the_images_are_mirrored():
    flipped = drawn(torch.arange(4000)).flipped
    assert flipped.dtype == torch.bool
    assert abs(float(flipped.double().mean()) - 0.5) < 4 * math.sqrt(0.25 / 4000)


def test_flip_images_mirrors_the_given_images_only():
    images, flipped = pixels(3, 4), torch.tensor([True, False, True])
    made = flip_images(images, flipped)
    assert made.dtype == torch.uint8
    for i in range(3):
        columns = [3, 2, 1, 0] if flipped[i] else [0, 1, 2, 3]
        assert torch.equal(made[i], images[i][:, columns])


def test_levels_are_those_of_the_timestep():
    found, schedule = drawn(torch.arange(500)), linear(100)
    assert found.t.dtype == torch.int64 and len(found.t.unique()) > 90
    assert torch.equal(found.alpha.flatten(), schedule.alphas[found.t])
    assert torch.equal(found.sigma.flatten(), schedule.sigmas[found.t])
    assert found.alpha.shape == (500, 1, 1, 1)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_the_given_fraction_of_labels_is_dropped(fraction: float):
    labels = drawn(torch.arange(4000), fraction).labels
    dropped = labels == 10
    assert torch.equal(labels[~dropped], (torch.arange(4000) % 10)[~dropped])
    # Four standard errors; none for a fraction of 0 or 1.
    bound = 4 * math.sqrt(fraction * (1 - fraction) / 4000)
    assert abs(float(dropped.double().mean()) - fraction) <= bound


def inputs(
    count: int, size: int = 8, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Draws]:
    """Return images, labels, alphas, sigmas, and draws of two epochs and a seed beyond 32 bits."""
    schedule, index = linear(100), torch.arange(count, device=device)
    draws = Draws.of(2**40 + 7, 1000 * index + 3, index % 2)
    levels = (level.to(device, torch.float32) for level in (schedule.alphas, schedule.sigmas))
    return pixels(count, size).to(device), index % 10, *levels, draws


def make(**settings: Any) -> ForwardProcess:
    usual = {"prediction": "v", "label_drop": 0.3, "null_label": 10}
    return ForwardProcess(**{**usual, "flip": True, "dequantize": True, **settings})


def assert_same(made: Example, expected: Example) -> None:
    for name in ("t", "labels", "alpha", "sigma"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    for name in ("x_t", "target", "x_0"):
        one, other = getattr(made, name), getattr(expected, name)
        # Normals, up to 5.77 in float32, may differ by some units in the last place.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert one.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_the_target_of_an_example_is_its_prediction(prediction: Any):
    images, labels, alphas, sigmas, draws = inputs(6)
    made = make(prediction=prediction, keep_x_0=True)(images, labels, alphas, sigmas, draws)
    assert made.x_0 is not None
    x_0, eps = to_x_0_and_eps(prediction, made.target, made.x_t, made.alpha, made.sigma)
    # Dividing by a small sigma or alpha magnifies rounding.
    torch.testing.assert_close(x_0, made.x_0, rtol=0, atol=1e-4)
    torch.testing.assert_close(made.alpha * x_0 + made.sigma * eps, made.x_t, rtol=0, atol=1e-5)


def test_x_0_is_kept_only_with_keep_x_0():
    assert make()(*inputs(2)).x_0 is None


@pytest.mark.slow
def test_compiled_noising_equals_eager():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs uncompiled.*")  # else eager meets eager
        made = make(backend="compiled", keep_x_0=True)(*inputs(4))
    assert_same(made, make(keep_x_0=True)(*inputs(4)))


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("flip, dequantize", [(True, True), (True, False), (False, True)])
def test_noising_in_one_kernel_equals_eager(
    kernel_device: str, prediction: Any, flip: bool, dequantize: bool
):
    settings = {"prediction": prediction, "flip": flip, "dequantize": dequantize, "keep_x_0": True}
    for size in (32, 5):  # 5 x 5 x 3 numbers use three of the last block's four
        images = inputs(4, size, kernel_device)
        assert_same(make(backend="kernel", **settings)(*images), make(**settings)(*images))


def test_noising_in_one_kernel_stores_the_given_dtype(kernel_device: str):
    images = inputs(2, device=kernel_device)
    made, expected = make(backend="kernel")(*images, dtype=torch.bfloat16), make()(*images)
    assert made.x_t.dtype == torch.bfloat16 and made.target.dtype == torch.float32
    torch.testing.assert_close(made.x_t, expected.x_t.bfloat16(), rtol=2**-7, atol=1e-6)
