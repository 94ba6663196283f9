"""SSIM and PSNR against scikit-image 0.26, `skimage.metrics`, on grey levels from 0 to 255.

Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity",
equation 13, with the settings that scikit-image names for that paper: Gaussian weights of sigma
1.5, no sample covariance, data range 255.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dgm.evaluation.image_similarity import MIN_SIDE, psnr, ssim

CHANGES = {
    "noise of 20 levels": lambda x, noise: x + 20 * noise,
    "noise of 1 level": lambda x, noise: x + noise,
    "flipped": lambda x, noise: x[:, ::-1],
    "30 levels lighter": lambda x, noise: x + 30,
    "half the contrast": lambda x, noise: 0.5 * (x - 127) + 127,
    "inverted": lambda x, noise: 255 - x,
    "black": lambda x, noise: 0 * x,
}


def smooth_image(side: int, channels: int = 3) -> np.ndarray:
    """Return an image [H, W, C] of a few waves, in grey levels."""
    rng = np.random.default_rng(7)
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    image = np.full((side, side, channels), 110.0)
    for _ in range(6):
        wave, phase = rng.normal(0, 0.25, 2), rng.uniform(0, 6, channels)
        angle = wave[0] * rows + wave[1] * columns
        image += 25 * np.sin(angle[:, :, None] + phase)
    return image.clip(0, 255)


def batched(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def pair(change: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    image = smooth_image(side)
    noise = np.random.default_rng(8).normal(size=image.shape)
    return image, CHANGES[change](image, noise).clip(0, 255)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", [MIN_SIDE, 16, 32])
def test_ssim_matches_scikit_image(change: str, side: int) -> None:
    image, other = pair(change, side)
    expected = structural_similarity(
        image, other, data_range=255, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, channel_axis=2,
    )  # fmt: skip
    # Ours filters in one pass and theirs along each axis in turn: rounding of float64.
    assert float(ssim(batched(image), batched(other))) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("change", CHANGES)
def test_psnr_matches_scikit_image(change: str) -> None:
    image, other = pair(change, 32)
    expected = peak_signal_noise_ratio(image, other, data_range=255)
    assert float(psnr(batched(image), batched(other))) == pytest.approx(expected, rel=1e-12)


def test_identical_images_have_ssim_one_and_infinite_psnr() -> None:
    image = batched(smooth_image(16))
    assert float(ssim(image, image)) == pytest.approx(1) and math.isinf(psnr(image, image))


def test_images_of_a_batch_do_not_mix() -> None:
    pairs = [pair(change, 16) for change in CHANGES]
    a, b = (torch.cat([batched(both[i]) for both in pairs]) for i in (0, 1))
    for k, (image, other) in enumerate(pairs):
        alone = ssim(batched(image), batched(other))
        torch.testing.assert_close(ssim(a, b)[k : k + 1], alone, rtol=1e-12, atol=1e-14)
