"""What the diffusion objective samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from small_diffusion import NUM_CLASSES, SAMPLE, SMALL, RecordingNet, objective, unet

from dgm.diffusion.objective import DiffusionConfig
from dgm.diffusion.samplers import SamplerName
from dgm.rng import Draws


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "schedule, zero_terminal_snr, prediction",
    [
        ("linear", False, "eps"),
        ("cosine", False, "eps"),
        ("cosine", False, "x_0"),
        ("linear", True, "v"),
        ("cosine", True, "v"),
    ],
)
def test_samples_are_finite_at_any_number_of_steps(
    sampler: Any, steps: int, clip: bool, schedule: Any, zero_terminal_snr: bool, prediction: Any
):
    config = DiffusionConfig(
        schedule=schedule, zero_terminal_snr=zero_terminal_snr, prediction=prediction
    )
    made = objective(config, replace(SAMPLE, sampler=sampler, clip=clip), torch.float32)
    images = made.sample(
        {"net": RecordingNet()}, 2, torch.tensor([0, 1]), Draws.of(0, torch.arange(2)), steps=steps
    )
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_a_net_with_learned_variance_samples_with_any_variance(variance: Any):
    config = replace(SMALL, learned_variance=True)
    made = objective(config, replace(SAMPLE, sampler="ddpm", variance=variance))
    images = made.sample({"net": unet(config)}, 2, None, Draws.of(0, torch.arange(2)))
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


def test_guidance_one_is_the_conditional_model_at_half_the_work():
    made, net = objective(), RecordingNet()
    draws, labels = Draws.of(0, torch.arange(3)), torch.tensor([1, 2, 3])
    plain = made.sample({"net": net}, 3, labels, draws)
    assert all(len(x) == 3 for x, _, _ in net.calls)
    assert all(torch.equal(given, labels) for *_, given in net.calls)
    nearly = made.sample({"net": net}, 3, labels, draws, guidance=1 + 1e-12)
    assert len(net.calls[-1][0]) == 6
    torch.testing.assert_close(nearly, plain, rtol=0, atol=1e-9)
    none = made.sample({"net": net}, 3, None, draws)
    nothing = made.sample({"net": net}, 3, labels, draws, guidance=0.0)
    torch.testing.assert_close(nothing, none, rtol=0, atol=1e-9)  # rounding over 5 steps
    assert not torch.allclose(plain, none)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 4.0])
def test_guidance_extrapolates_from_no_class_to_the_class(guidance: float):
    made, net = objective(), RecordingNet()
    labels = torch.tensor([0, 3])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out = made.denoiser(net, labels, guidance, clip=False)(x, 20)
    without = 0.5 * x.tanh() + 0.1 * NUM_CLASSES
    with_class = 0.5 * x.tanh() + 0.1 * labels[:, None, None, None]
    expected = without + guidance * (with_class - without)
    torch.testing.assert_close(out.eps, expected, rtol=0, atol=1e-12)  # rounding


def test_clipping_keeps_x_0_and_eps_consistent():
    made, x = objective(), 3 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for t in (0, 20, 49):
        alpha, sigma = made.schedule.alphas[t], made.schedule.sigmas[t]
        for clip in (True, False):
            out = made.denoiser(RecordingNet(), None, clip=clip)(x, t)
            torch.testing.assert_close(alpha * out.x_0 + sigma * out.eps, x, rtol=0, atol=1e-10)
            assert (out.x_0.abs().max() <= 1) == clip
