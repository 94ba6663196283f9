"""Every consumer of an objective's images takes that objective's pixel map.

The map here, x = (u + 7) / 100 - 1, is used by no objective, so code that assumes another map is
off by many levels. Expected levels are known in advance, not computed by our own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_diffusion
import small_vae
import torch
from torch import Tensor

from dgm.cli.denoise import Denoiser
from dgm.diffusion import objective as diffusion_objective
from dgm.diffusion import sdedit
from dgm.evaluation import online_eval, sampler_sweep
from dgm.evaluation.classifier import Classifier
from dgm.evaluation.distances import FeatureStatistics
from dgm.evaluation.image_similarity import ssim
from dgm.evaluation.likelihood import ImageSubset
from dgm.evaluation.reconstruction import reconstruction_error
from dgm.images import grid
from dgm.objective import Batch, Nets
from dgm.preprocessing import STANDARD, PixelMap
from dgm.rng import Draws
from dgm.training.engine import Engine
from dgm.training.sampling import draw_grids

ODD = PixelMap(100.0, 7.0)
COUNT, SIDE = 12, 16


class Stored:
    """Images of random levels, as a data set and as what a family makes."""

    num_classes = None
    sample_config = SimpleNamespace(batch=COUNT)
    pixels = ODD
    image_shape = (SIDE, SIDE, 3)

    def __init__(self) -> None:
        self.levels = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)

    def __len__(self) -> int:
        return COUNT

    def images(self, index: np.ndarray) -> np.ndarray:
        return self.levels[index]

    def labels(self, index: np.ndarray) -> np.ndarray:
        return np.arange(COUNT)[index] % 2

    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        levels = torch.from_numpy(self.levels[draws.index.numpy()].astype(float))
        return (levels.permute(0, 3, 1, 2) + 7) / 100 - 1

    def visualize(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        return {"shown": self.sample(nets, COUNT, None, draws).unflatten(0, (3, 4))}


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def classified(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[np.ndarray]]:
    """Return a list of the images that a module's classifier gets."""

    def spy(module: Any) -> list[np.ndarray]:
        seen: list[np.ndarray] = []

        def extract_features(net: object, images: np.ndarray) -> Tensor:
            seen.append(images)
            return torch.randn(len(images), 128)

        monkeypatch.setattr(module, "extract_features", extract_features)
        return seen

    return spy


def test_image_grids_of_a_run_hold_the_stored_levels(stored: Stored, engine: Engine) -> None:
    numbers = Draws.of(0, torch.arange(COUNT))
    data = SimpleNamespace(images=lambda _: stored.levels[:1])
    batches: Any = SimpleNamespace(first_images=lambda *_: (None, numbers), data=data)
    sheets = draw_grids(engine, stored, {}, 3, 4, 0, batches)
    assert np.array_equal(sheets["samples"], grid(stored.levels, 4))
    assert np.array_equal(sheets["shown"], grid(stored.levels, 4))


def test_the_frechet_distance_of_a_run_is_of_the_stored_levels(
    stored: Stored, engine: Engine, classified: Callable
) -> None:
    seen = classified(online_eval)
    real = FeatureStatistics.from_features(torch.randn(200, 128))
    online_eval.fd_classifier(engine, stored, {}, Classifier(2), real, torch.arange(COUNT) % 2)
    assert np.array_equal(seen[0], stored.levels)


def test_a_sampler_sweep_compares_the_stored_levels(
    stored: Stored, engine: Engine, classified: Callable
) -> None:
    seen = classified(sampler_sweep)
    real = FeatureStatistics.from_features(torch.randn(200, 128))
    quality = sampler_sweep.SampleQuality(Classifier(2).eval(), real, False)
    labels = torch.arange(COUNT) % 2
    _, sheet = sampler_sweep.sweep_sampler(engine, stored, {}, quality, [{"a": 1}], labels, 5, 0)
    assert np.array_equal(seen[0], stored.levels)
    assert np.array_equal(STANDARD.to_uint8(sheet[0]).numpy(), stored.levels[:5])


def test_reconstructions_are_compared_in_grey_levels(stored: Stored, engine: Engine) -> None:
    class Lighter(small_vae.VAEObjective):
        def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
            return batch.images.permute(0, 3, 1, 2).double()

        def decode(self, nets: Nets, z: Tensor, labels: Tensor | None = None) -> Tensor:
            return ((z * 0.5 + 3) + 7) / 100 - 1

    made = Lighter(small_vae.SMALL, small_vae.VAESampleConfig(), 6, torch.float64)
    made.pixels = ODD
    found = reconstruction_error(made, {}, ImageSubset(engine, stored, torch.arange(COUNT), 0))
    levels = stored.levels.astype(float)
    error = np.sqrt(((0.5 * levels + 3 - levels) ** 2).mean())
    assert found["rms_error_grey_levels"] == pytest.approx(error, rel=1e-9)
    assert found["psnr_db"] == pytest.approx(20 * np.log10(255 / error))
    real = torch.from_numpy(levels).permute(0, 3, 1, 2)
    assert found["ssim"] == pytest.approx(float(ssim(0.5 * real + 3, real).mean()))


def odd_diffusion() -> Any:
    made = small_diffusion.objective(replace(small_diffusion.SMALL, class_conditional=False))
    made.image_shape, made.pixels = (SIDE, SIDE, 3), ODD
    return made


def test_diffusion_noises_and_encodes_images_of_its_map(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, draws = odd_diffusion(), Draws.of(0, torch.arange(COUNT))
    images = torch.from_numpy(stored.levels)
    x_0 = (images.permute(0, 3, 1, 2).double() + 7) / 100 - 1
    noised = sdedit.noise(made, images, draws, 9)
    eps = draws.normal("noise", (SIDE, SIDE, 3), torch.float64).permute(0, 3, 1, 2)
    level = made.schedule.alphas_cumprod[8]
    expected = level.sqrt() * x_0 + (1 - level).sqrt() * eps
    torch.testing.assert_close(noised, expected, rtol=1e-12, atol=1e-12)
    seen: list[Tensor] = []

    def inverse(denoiser: object, x: Tensor, *_: object) -> Tensor:
        seen.append(x)
        return x

    monkeypatch.setattr(diffusion_objective, "ddim_inverse", inverse)
    made.encode({"net": torch.nn.Identity()}, Batch(images, torch.zeros(COUNT).long()), draws)
    torch.testing.assert_close(seen[0], x_0, rtol=1e-12, atol=1e-12)


def test_denoised_images_are_compared_in_grey_levels(stored: Stored) -> None:
    made = odd_diffusion()
    options = SimpleNamespace(num_images=COUNT, seed=0, num_shown=4)
    context: Any = SimpleNamespace(
        engine=SimpleNamespace(device=torch.device("cpu")), options=options, test=stored,
        classifier=Classifier(2).eval(),
    )  # fmt: skip
    denoiser = Denoiser(context, made)
    levels = torch.from_numpy(stored.levels[denoiser.index]).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(denoiser.real.double(), (levels + 7) / 100 - 1, rtol=0, atol=1e-6)
    darker = (0.5 * levels + 7) / 100 - 1
    found = denoiser._metrics(darker, denoiser.real)
    error = (0.5 * levels).square().mean((1, 2, 3))
    expected = (10 * torch.log10(255**2 / error)).mean()
    assert found["psnr_db_noised"] == pytest.approx(float(expected), rel=1e-6)  # float32
    assert found["ssim_denoised"] == pytest.approx(1) and found["feature_distance_denoised"] == 0
