"""The diffusion objective: its loss, its samples, its bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from dgm.diffusion.objective import DiffusionConfig, DiffusionObjective, SampleConfig
from dgm.diffusion.prediction import loss_weight, target
from dgm.diffusion.samplers import SamplerName
from dgm.diffusion.unet import UNet, UNetConfig
from dgm.errors import UserError
from dgm.objective import Batch
from dgm.rng import Draws

NUM_CLASSES = 5
TINY = UNetConfig(channels=8, channel_mult=[1, 2], num_blocks=[1, 1], attention_at=[], dropout=0.1)
SMALL = DiffusionConfig(num_timesteps=50)
SAMPLE = SampleConfig(steps=5)


def objective(
    config: DiffusionConfig = SMALL,
    sample: SampleConfig = SAMPLE,
    dtype: torch.dtype = torch.float64,
) -> DiffusionObjective:
    return DiffusionObjective(config, sample, (8, 8, 3), NUM_CLASSES, dtype=dtype)


def batch(count: int, epoch: int = 0) -> tuple[Batch, Draws]:
    index = torch.arange(count)
    images = Draws.of(9, index).uniform("noise", (8, 8, 3)).mul(256).byte()
    return Batch(images, index % NUM_CLASSES), Draws.of(0, index, epoch)


def part_of(whole: Batch, start: int, stop: int) -> tuple[Batch, Draws]:
    part = slice(start, stop)
    return Batch(whole.images[part], whole.labels[part]), Draws.of(0, torch.arange(start, stop))


class Told(nn.Module):
    """A net that remembers what it was told, and says the same of every image of a class."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.heard: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        self.heard.append((x, t, labels))
        said = 0.5 * x.tanh() * self.weight
        if labels is not None:
            said = said + 0.1 * labels[:, None, None, None]
        return torch.cat([said] * (self.outputs // 3), dim=1).to(x.dtype)


def unet(config: DiffusionConfig = SMALL) -> UNet:
    net = UNet(
        TINY,
        8,
        output_channels=6 if config.learned_variance else 3,
        num_classes=NUM_CLASSES if config.class_conditional else None,
    )
    with torch.no_grad():  # move what starts at zero
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.double()


def loss(made: DiffusionObjective, net: nn.Module, given: tuple[Batch, Draws]) -> dict[str, Tensor]:
    return made.loss({"net": net}, given[0], made.phases[0], given[1])


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("weighting", ["simple", "min_snr"])
def test_loss_is_the_weighted_squared_error_of_the_prediction(prediction: Any, weighting: Any):
    config = replace(SMALL, prediction=prediction, weighting=weighting, class_conditional=False)
    made, net = objective(config), Told()
    whole, draws = batch(16)
    found = loss(made, net, (whole, draws))
    (x_t, t, _) = net.heard[0]
    column = t[:, None, None, None]
    alpha, sigma = made.schedule.alphas[column], made.schedule.sigmas[column]
    eps = draws.normal("noise", (8, 8, 3), torch.float64).permute(0, 3, 1, 2)
    x_0 = (x_t - sigma * eps) / alpha
    # What x_0 is left after that: a stored image, mirrored or not.
    stored = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    off = torch.minimum(
        (x_0 - stored).abs().amax((1, 2, 3)), (x_0 - stored.flip(3)).abs().amax((1, 2, 3))
    )
    assert off.max() < 1e-10
    error = (0.5 * x_t.tanh() - target(prediction, x_0, eps, alpha, sigma)).square().mean((1, 2, 3))
    weight = loss_weight(prediction, weighting, made.schedule.snr[t], config.min_snr_gamma)
    torch.testing.assert_close(found["loss"].detach(), (weight * error).mean(), rtol=1e-9, atol=0)
    assert set(found) == {"loss"}


def test_loss_is_finite_the_same_each_time_and_leaves_torchs_stream_alone():
    made, net = objective(), unet()
    state = torch.get_rng_state()
    one, other = (float(loss(made, net, batch(8))["loss"].detach()) for _ in range(2))
    assert math.isfinite(one) and one == other
    assert torch.equal(torch.get_rng_state(), state)
    assert float(loss(made, net, batch(8, epoch=1))["loss"].detach()) != one


def test_loss_starts_at_one_with_a_net_that_says_zero():
    net = UNet(TINY, 8, num_classes=NUM_CLASSES).double()
    found = float(loss(objective(), net, batch(64))["loss"].detach())
    # The mean square of 12,288 normals; four standard errors.
    assert abs(found - 1) < 4 * math.sqrt(2 / (64 * 8 * 8 * 3))


@pytest.mark.parametrize("learned_variance", [False, True])
def test_loss_of_a_batch_is_the_mean_over_its_parts(learned_variance: bool):
    config = replace(SMALL, learned_variance=learned_variance)
    made, net = objective(config), unet(config)
    whole = batch(12)
    together = loss(made, net, whole)
    parts = [loss(made, net, part_of(whole[0], i, i + 4)) for i in (0, 4, 8)]
    for name, value in together.items():
        mean = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(value, mean, rtol=1e-10, atol=0)  # rounding of float64


def test_images_are_mirrored_only_where_asked():
    for flip in (True, False):
        made, net = objective(replace(SMALL, flip=flip)), Told()
        whole, draws = batch(64)
        loss(made, net, (whole, draws))
        x_t, t, _ = net.heard[0]
        column = t[:, None, None, None]
        eps = draws.normal("noise", (8, 8, 3), torch.float64).permute(0, 3, 1, 2)
        x_0 = (x_t - made.schedule.sigmas[column] * eps) / made.schedule.alphas[column]
        stored = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
        kept = (x_0 - stored).abs().amax((1, 2, 3)) < 1e-10
        assert kept.all() if not flip else 16 < int(kept.sum()) < 48  # four standard errors


def test_gradient_reaches_the_net_and_nothing_else():
    made, net, other = objective(), unet(), unet()
    whole, draws = batch(8)
    found = made.loss({"net": net, "other": other}, whole, made.phases[0], draws)
    found["loss"].backward()
    untouched = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert all(p.grad is None for p in other.parameters())
    assert made.phases[0].net == "net"


def test_the_bound_teaches_the_variance_and_not_the_mean():
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


def test_the_share_of_labels_asked_for_is_dropped_image_by_image():
    made, net = objective(replace(SMALL, label_drop=0.25)), Told()
    whole, draws = batch(4000)
    loss(made, net, (whole, draws))
    told = net.heard[0][2]
    assert told is not None
    dropped = told == NUM_CLASSES
    assert torch.equal(told[~dropped], whole.labels[~dropped])
    # Four standard errors of a share of 4000; and each class loses some, none all.
    assert abs(float(dropped.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    for label in range(NUM_CLASSES):
        assert 0.1 < float(dropped[whole.labels == label].double().mean()) < 0.4
    loss(made, net, part_of(whole, 100, 103))
    assert torch.equal(net.heard[1][2], told[100:103])


def test_an_unconditional_net_is_told_no_class():
    made, net = objective(replace(SMALL, class_conditional=False)), Told()
    loss(made, net, batch(4))
    made.sample({"net": net}, 2, torch.tensor([1, 2]), Draws.of(0, torch.arange(2)))
    assert made.num_classes is None
    assert all(labels is None for *_, labels in net.heard)


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
        {"net": Told()}, 2, torch.tensor([0, 1]), Draws.of(0, torch.arange(2)), steps=steps
    )
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_samples_are_finite_over_all_timesteps(sampler: Any, zero_terminal_snr: bool):
    config = DiffusionConfig(num_timesteps=400, zero_terminal_snr=zero_terminal_snr, prediction="v")
    made = objective(config, SampleConfig(sampler, 400), torch.float32)
    images = made.sample({"net": Told()}, 2, None, Draws.of(0, torch.arange(2)))
    assert images.isfinite().all() and images.abs().max() <= 1


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_a_learned_variance_samples_with_any(variance: Any):
    config = replace(SMALL, learned_variance=True)
    made = objective(config, replace(SAMPLE, sampler="ddpm", variance=variance))
    images = made.sample({"net": unet(config)}, 2, None, Draws.of(0, torch.arange(2)))
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samples_do_not_depend_on_batch_or_process(sampler: Any, guidance: float):
    made, net = objective(sample=replace(SAMPLE, sampler=sampler, guidance=guidance)), unet()
    labels, draws = torch.arange(5), Draws.of(3, torch.arange(5))
    whole = made.sample({"net": net}, 5, labels, draws)
    for size in (1, 2):
        parts = made.sample({"net": net}, 5, labels, draws, batch=size)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)  # rounding over 5 steps
    # As a second process would: the last two images only.
    rest = made.sample({"net": net}, 2, labels[3:], Draws.of(3, torch.tensor([3, 4])))
    torch.testing.assert_close(rest, whole[3:], rtol=0, atol=1e-9)
    assert not torch.allclose(whole[0], whole[1])
    another = made.sample({"net": net}, 5, labels, Draws.of(4, torch.arange(5)))
    assert not torch.allclose(whole, another)


def test_guidance_one_is_the_conditional_model_at_half_the_work():
    made, net = objective(), Told()
    draws, labels = Draws.of(0, torch.arange(3)), torch.tensor([1, 2, 3])
    plain = made.sample({"net": net}, 3, labels, draws)
    assert all(len(x) == 3 for x, _, _ in net.heard)
    assert all(torch.equal(told, labels) for *_, told in net.heard)
    nearly = made.sample({"net": net}, 3, labels, draws, guidance=1 + 1e-12)
    assert len(net.heard[-1][0]) == 6
    torch.testing.assert_close(nearly, plain, rtol=0, atol=1e-9)
    none = made.sample({"net": net}, 3, None, draws)
    nothing = made.sample({"net": net}, 3, labels, draws, guidance=0.0)
    torch.testing.assert_close(nothing, none, rtol=0, atol=1e-9)  # rounding over 5 steps
    assert not torch.allclose(plain, none)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, 4.0])
def test_guidance_extrapolates_from_no_class_to_the_class(guidance: float):
    made, net = objective(), Told()
    labels = torch.tensor([0, 3])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    said = made.denoiser(net, labels, guidance, clip=False)(x, 20)
    without = 0.5 * x.tanh() + 0.1 * NUM_CLASSES
    with_class = 0.5 * x.tanh() + 0.1 * labels[:, None, None, None]
    expected = without + guidance * (with_class - without)
    torch.testing.assert_close(said.eps, expected, rtol=0, atol=1e-12)  # rounding


def test_clipping_keeps_image_and_noise_in_agreement():
    made, x = objective(), 3 * torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for t in (0, 20, 49):
        alpha, sigma = made.schedule.alphas[t], made.schedule.sigmas[t]
        for clip in (True, False):
            said = made.denoiser(Told(), None, clip=clip)(x, t)
            torch.testing.assert_close(alpha * said.x_0 + sigma * said.eps, x, rtol=0, atol=1e-10)
            assert (said.x_0.abs().max() <= 1) == clip


@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_bound_has_finite_terms_for_each_image(learned_variance: bool):
    config = replace(SMALL, learned_variance=learned_variance, num_timesteps=20)
    made, net = objective(config, replace(SAMPLE, steps=1)), unet(config)
    whole, draws = batch(4)
    terms = made.nats({"net": net}, whole, draws)
    assert set(terms) == {"decoder", "steps", "prior"}
    for name, value in terms.items():
        assert value.shape == (4,) and value.isfinite().all() and (value > 0).all(), name
    for i in range(4):
        alone = made.nats({"net": net}, *part_of(whole, i, i + 1))
        for name, value in alone.items():
            torch.testing.assert_close(value[0], terms[name][i], rtol=1e-9, atol=0)  # rounding


def test_the_bound_draws_noise_anew_at_each_timestep():
    made, net = objective(replace(SMALL, class_conditional=False)), Told()
    whole, draws = batch(16)
    made.nats({"net": net}, whole, draws)
    x_0 = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    alphas, sigmas = made.schedule.alphas, made.schedule.sigmas
    eps = [((x_t - alphas[i] * x_0) / sigmas[i]).flatten() for i, (x_t, *_) in enumerate(net.heard)]
    assert [int(t[0]) for _, t, _ in net.heard] == list(range(50))
    correlations = torch.corrcoef(torch.stack(eps)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / math.sqrt(16 * 192)  # 1,225 pairs: once in 1,400
    assert torch.stack(eps).std() == pytest.approx(1, abs=0.01)  # five standard errors


def test_the_bound_is_close_for_images_that_the_net_knows():
    made = objective(DiffusionConfig(prediction="x_0", class_conditional=False))
    whole, draws = batch(4)
    x_0 = whole.images.permute(0, 3, 1, 2).double() / 127.5 - 1

    class Knows(nn.Module):
        def forward(self, *_: object) -> Tensor:
            return x_0

    terms = made.nats({"net": Knows()}, whole, draws)
    bits = {k: float(v.mean()) / (8 * 8 * 3 * math.log(2)) for k, v in terms.items()}
    # With the large variance each step still pays for being wider than the true one.
    assert bits["prior"] < 1e-4 and 0 < bits["steps"] < 2
    # A normal of deviation 0.01 has 0.305 of its mass in a level 2 / 255 wide: 1.713 bits; the
    # first and the last level of 256 cost less.
    assert bits["decoder"] == pytest.approx(1.713, abs=0.02)
    made = objective(replace(made.config, learned_variance=True, num_timesteps=100))

    class KnowsVariance(nn.Module):
        def forward(self, *_: object) -> Tensor:
            return torch.cat([x_0, torch.full_like(x_0, -1)], dim=1)

    steps = made.nats({"net": KnowsVariance()}, whole, draws)["steps"]
    torch.testing.assert_close(steps, torch.zeros_like(steps), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config, sample, named",
    [
        ({"zero_terminal_snr": True}, {}, r"diffusion\.zero_terminal_snr .*choose v or x_0"),
        ({"label_drop": -0.1}, {}, r"diffusion\.label_drop is -0\.1"),
        ({"label_drop": 1.1}, {}, r"diffusion\.label_drop is 1\.1"),
        ({"label_drop": 0.0}, {"guidance": 2.0}, r"sample\.guidance is 2\.0"),
        ({"class_conditional": False}, {"guidance": 2.0}, r"sample\.guidance is 2\.0"),
        ({}, {"variance": "learned"}, r"sample\.variance is 'learned'"),
        ({}, {"steps": 0}, r"sample\.steps is 0: choose 1 to 50"),
        ({}, {"steps": 51}, r"sample\.steps is 51: choose 1 to 50"),
        ({}, {"eta": 1.5}, r"sample\.eta is 1\.5"),
        ({}, {"eta": -0.5}, r"sample\.eta is -0\.5"),
        ({}, {"batch": 0}, r"sample\.batch is 0"),
        ({"num_timesteps": 1}, {"steps": 1}, r"diffusion\.num_timesteps is 1"),
    ],
)
def test_settings_that_clash_are_named_before_training(
    config: dict[str, Any], sample: dict[str, Any], named: str
):
    with pytest.raises(UserError, match=named):
        objective(replace(SMALL, **config), replace(SAMPLE, **sample))


def test_knobs_of_a_call_are_checked_too():
    with pytest.raises(UserError, match=r"sample\.steps is 51"):
        objective().sample({"net": Told()}, 1, None, Draws.of(0, torch.arange(1)), steps=51)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_tiny_net_overfits_eight_images(prediction: Any):
    config = replace(SMALL, prediction=prediction, label_drop=0.0, flip=False)
    made = DiffusionObjective(config, SAMPLE, (8, 8, 3), NUM_CLASSES)
    shape = UNetConfig(
        channels=24, channel_mult=[1, 2], num_blocks=[1, 1], attention_at=[], dropout=0.0
    )
    net = UNet(shape, 8, num_classes=NUM_CLASSES)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    # Flat colours: noise pictures would have to be learned by heart, pixel by pixel.
    images = Draws.of(9, torch.arange(8)).uniform("noise", (1, 1, 3)).mul(256).byte()
    whole = Batch(images.repeat(4, 8, 8, 1), torch.arange(32) % 8 % NUM_CLASSES)
    losses = []
    for step in range(120):
        found = loss(made, net, (whole, Draws.of(0, torch.arange(32), step)))["loss"]
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    # A net that learns nothing stays at 1; 0.3 (v) and 0.2 (eps) were reached.
    assert last < 0.5 * first
