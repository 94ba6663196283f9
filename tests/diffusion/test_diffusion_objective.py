"""The diffusion objective: its loss, samples, guidance and invalid settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from small_diffusion import (
    NUM_CLASSES,
    SAMPLE,
    SMALL,
    TINY,
    RecordingNet,
    batch,
    loss,
    objective,
    unet,
)

from dgm.benchmarks.loops import count_conversions
from dgm.diffusion.objective import DiffusionConfig
from dgm.diffusion.parameterization import loss_weight, to_prediction
from dgm.diffusion.samplers import SamplerName
from dgm.diffusion.unet import UNet
from dgm.rng import Draws
from dgm.training.state_dicts import in_channels_last


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_loss_is_the_weighted_squared_error_of_the_prediction(prediction: Any, weighting: Any):
    config = replace(SMALL, prediction=prediction, weighting=weighting, class_conditional=False)
    made, net = objective(replace(config, flip=False)), RecordingNet()
    whole, draws = batch(16)
    found = loss(made, net, (whole, draws))
    x_t, t, _ = net.calls[0]
    levels = (made.schedule.alphas, made.schedule.sigmas)
    alpha, sigma = (level[t][:, None, None, None] for level in levels)
    eps = draws.normal("noise", (8, 8, 3), torch.float64).permute(0, 3, 1, 2)
    x_0 = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * eps, rtol=0, atol=1e-14)
    target = to_prediction(prediction, x_0, eps, alpha, sigma)
    error = (0.5 * x_t.tanh() - target).square().mean((1, 2, 3))
    weight = loss_weight(prediction, weighting, made.schedule.snr[t], config.min_snr_gamma)
    torch.testing.assert_close(found["loss"].detach(), (weight * error).mean(), rtol=1e-9, atol=0)
    assert set(found) == {"loss"}


def test_no_convolution_copies_images_into_another_layout():
    made = objective(dtype=torch.float32)
    config = replace(TINY, channels=16, num_blocks=[2, 1], attention_at=[4])
    net = in_channels_last(UNet(config, 8, num_classes=NUM_CLASSES))
    with torch.profiler.profile(record_shapes=True) as trace:
        loss(made, net, batch(8))["loss"].backward()
    assert any(event.name == "aten::convolution_backward" for event in trace.events())
    assert count_conversions(trace.events()) == 0


def test_the_bound_trains_the_variance_and_not_the_mean():
    config = replace(SMALL, learned_variance=True)
    made, net = objective(config), unet(config)
    found = loss(made, net, batch(8))
    weight = net.exit.weight
    of_all, of_simple, of_bound = (
        torch.autograd.grad(found[name], weight, retain_graph=True)[0]
        for name in ("loss", "loss_simple", "vlb_bits_per_dim")
    )
    assert not of_bound[:3].any() and of_bound[3:].any()
    assert not of_simple[3:].any() and of_simple[:3].any()
    expected = of_simple + config.vlb_weight * of_bound
    torch.testing.assert_close(of_all, expected, rtol=1e-10, atol=1e-16)  # rounding of float64
    total = found["loss_simple"] + config.vlb_weight * found["vlb_bits_per_dim"]
    torch.testing.assert_close(found["loss"], total, rtol=1e-12, atol=0)


def test_the_net_gets_the_null_label_where_labels_are_dropped():
    made, net = objective(replace(SMALL, label_drop=0.25)), RecordingNet()
    whole, draws = batch(400)
    loss(made, net, (whole, draws))
    labels = net.calls[0][2]
    assert labels is not None
    dropped = labels == NUM_CLASSES
    assert torch.equal(labels[~dropped], whole.labels[~dropped])
    assert 65 < int(dropped.sum()) < 135  # four standard errors


def test_an_unconditional_net_gets_no_labels():
    made, net = objective(replace(SMALL, class_conditional=False)), RecordingNet()
    loss(made, net, batch(4))
    made.sample({"net": net}, 2, torch.tensor([1, 2]), Draws.of(0, torch.arange(2)))
    assert made.num_classes is None
    assert all(labels is None for *_, labels in net.calls)


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
