"""The parts of a GAN: losses, penalty, augmentation, BatchNorm, networks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from small_gan import ARCHITECTURES, LATENT, NUM_CLASSES, nets
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.gan.batch_norm import BatchNorm
from dgm.gan.diffaugment import augment
from dgm.gan.losses import discriminator_loss, generator_loss, r1_penalty
from dgm.gan.networks import GanNetConfig, make_nets
from dgm.rng import Draws


def test_losses_are_those_of_the_papers():
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.3, -3.0])

    def cross_entropy(logits: Tensor, is_real: float) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, is_real), reduction="none"
        )

    loss_real, loss_fake = discriminator_loss("non_saturating", real, fake)
    torch.testing.assert_close(loss_real, cross_entropy(real, 1.0))
    torch.testing.assert_close(loss_fake, cross_entropy(fake, 0.0))
    torch.testing.assert_close(generator_loss("non_saturating", fake), cross_entropy(fake, 1.0))
    loss_real, loss_fake = discriminator_loss("hinge", real, fake)
    assert loss_real.tolist() == [0, 1.5] and loss_fake.tolist() == pytest.approx([1.3, 0])
    assert generator_loss("hinge", fake).tolist() == pytest.approx([-0.3, 3])
    loss_real, loss_fake = discriminator_loss("least_squares", real, fake)
    assert loss_real.tolist() == pytest.approx([0.5, 1.125])
    assert loss_fake.tolist() == pytest.approx([0.845, 2.0])
    assert generator_loss("least_squares", fake).tolist() == pytest.approx([0.045, 4.5])


def test_r1_penalty_is_the_squared_slope_and_has_a_gradient():
    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    real = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = (weight * real**2).sum((1, 2, 3))
    penalty = r1_penalty(logits, real)
    expected = (2 * weight * real).square().sum((1, 2, 3))
    torch.testing.assert_close(penalty, expected)
    (found,) = torch.autograd.grad(penalty.sum(), weight)
    torch.testing.assert_close(found, (8 * weight * real**2).sum(0).detach())


@pytest.mark.parametrize("kind", ["color", "translation", "cutout"])
def test_every_image_is_changed_by_its_own_draws(kind):
    x = torch.rand(64, 3, 8, 8, dtype=torch.float64) + 0.5
    draws = Draws.of(0, torch.arange(64))
    whole = augment(x, [kind], draws, "real")
    half = augment(x[32:], [kind], Draws.of(0, torch.arange(32, 64)), "real")
    torch.testing.assert_close(whole[32:], half, rtol=0, atol=0)
    same = augment(x[:1].expand(64, -1, -1, -1), [kind], draws, "real")
    assert len({tuple(image.flatten().tolist()) for image in same}) > 5
    assert not torch.equal(whole, augment(x, [kind], draws, "fake"))


def test_color_keeps_shift_and_ranges():
    x = torch.rand(2000, 3, 4, 4, dtype=torch.float64) * 2 - 1
    made = augment(x, ["color"], Draws.of(0, torch.arange(2000)), "real")
    shift = (made - x).mean((1, 2, 3))  # saturation and contrast keep an image's mean
    assert shift.min() > -0.5 and shift.max() < 0.5 and shift.max() - shift.min() > 0.98
    contrast = made.mean(1).std((1, 2)) / x.mean(1).std((1, 2))
    assert contrast.min() > 0.5 and contrast.max() < 1.5 and contrast.std() > 0.25


def test_translation_moves_by_whole_pixels_up_to_an_eighth():
    x = torch.zeros(900, 1, 16, 16, dtype=torch.float64)
    x[:, :, 8, 8] = 1
    made = augment(x, ["translation"], Draws.of(0, torch.arange(900)), "real")
    places = made.flatten(1).argmax(1)
    moved = torch.stack([places // 16 - 8, places % 16 - 8])
    assert (made.sum((1, 2, 3)) == 1).all()
    for axis in moved:
        # 900 draws of five places: 180 each, give or take four standard deviations.
        counts = torch.bincount(axis + 2, minlength=5)
        assert len(counts) == 5 and (counts - 180).abs().max() < 4 * math.sqrt(180)
    edge = augment(torch.ones_like(x), ["translation"], Draws.of(0, torch.arange(900)), "real")
    away = moved[0].abs() * 16 + moved[1].abs() * 16 - (moved[0] * moved[1]).abs()
    torch.testing.assert_close(256 - edge.sum((1, 2, 3)), away.double())  # what came in is 0


def test_cutout_zeroes_a_square_of_half_the_side():
    x = torch.ones(500, 3, 16, 16, dtype=torch.float64)
    cut = augment(x, ["cutout"], Draws.of(0, torch.arange(500)), "real") == 0
    assert (cut[:, 0] == cut[:, 1]).all() and (cut[:, 0] == cut[:, 2]).all()
    area = cut[:, 0].sum((1, 2))
    assert area.max() == 64 and area.min() >= 16  # a middle in a corner leaves a quarter
    assert (cut.any(0)).all()


def test_augmentation_leaves_images_alone_as_often_as_told():
    x = torch.rand(2000, 3, 8, 8) * 2 - 1
    draws = Draws.of(0, torch.arange(2000))
    for kind in ("color", "cutout"):  # a translation by nothing changes nothing either
        every, some = augment(x, [kind], draws, "real"), augment(x, [kind], draws, "real", 0.6)
        hit = (some != x).flatten(1).any(1)
        assert hit.double().mean() == pytest.approx(0.6, abs=0.04)
        assert torch.equal(some[hit], every[hit])


def test_augmentation_passes_gradients():
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    made = augment(x, ["color", "translation", "cutout"], Draws.of(0, torch.arange(8)), "real")
    made.sum().backward()
    assert x.grad is not None and (x.grad.flatten(1) != 0).any(1).all()


@pytest.mark.parametrize("classes", [None, NUM_CLASSES])
def test_batch_norm_alone_is_torchs(classes):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(4, classes).double(), nn.BatchNorm2d(4).double()
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64) * 3 + 1
    labels = torch.arange(6) % NUM_CLASSES
    for _ in range(2):
        torch.testing.assert_close(ours(x, labels), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x, labels), theirs.eval()(x))
    if classes is not None:
        nn.init.uniform_(ours.weight)
        nn.init.uniform_(ours.bias)
        wanted = (
            theirs(x) * ours.weight[labels][..., None, None] + ours.bias[labels][..., None, None]
        )
        torch.testing.assert_close(ours(x, labels), wanted)


def part_of_batch_norm(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    norm, x, wanted = torch.load(f"{folder}/given.pt", weights_only=False)
    mine = x[rank * 3 : rank * 3 + 3].requires_grad_()
    made = norm(mine)
    (slope,) = torch.autograd.grad(
        (made * wanted[rank * 3 : rank * 3 + 3]).sum(), mine, create_graph=True
    )
    slope.square().sum().backward()
    torch.save((made.detach(), slope.detach(), mine.grad, norm.running_var), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_norm_of_two_processes_is_that_of_one(tmp_path: Path):
    torch.manual_seed(0)
    norm = BatchNorm(4).double()
    x, wanted = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64) * 3 + 1
    torch.save((norm, x, wanted), tmp_path / "given.pt")
    multiprocessing.spawn(part_of_batch_norm, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x.requires_grad_()
    made = norm(x)
    (slope,) = torch.autograd.grad((made * wanted).sum(), x, create_graph=True)
    slope.square().sum().backward()
    # First and second derivatives too: the R1 penalty goes through it twice.
    for i, whole in enumerate((made, slope, x.grad)):
        torch.testing.assert_close(
            torch.cat([part[i] for part in parts]), whole, rtol=1e-10, atol=1e-12
        )
    for part in parts:
        torch.testing.assert_close(part[3], norm.running_var)


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("classes", [None, NUM_CLASSES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_networks_fit_each_other(architecture, classes, side):
    made = nets(architecture, classes, side)
    labels = None if classes is None else torch.arange(5) % classes
    images = made["generator"](torch.randn(5, LATENT, dtype=torch.float64), labels)
    assert images.shape == (5, 3, side, side) and images.abs().max() <= 1
    assert made["discriminator"](images, labels).shape == (5,)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_changes_image_and_judgement(architecture):
    made = nets(architecture, NUM_CLASSES)
    for net in made.values():
        for module in net.modules():  # by class they begin equal
            if isinstance(module, BatchNorm) and module.weight.ndim == 2:
                nn.init.uniform_(module.weight)
    latent = torch.randn(4, LATENT, dtype=torch.float64)
    for net, given in (("generator", latent), ("discriminator", torch.randn(4, 3, 8, 8).double())):
        net = made[net].eval()
        one, other = (net(given, torch.full((4,), c)) for c in (0, 1))
        assert not torch.allclose(one, other)


def test_dcgan_has_the_parameters_of_the_paper_for_32():
    config = GanNetConfig()
    made = make_nets(config, (32, 32, 3), None)
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in made.items()}
    # By hand: linear 100 -> 4*4*512, then 4x4 kernels 512 -> 256 -> 128 -> 3, norms of two each.
    generator = 100 * 8192 + 16 * (512 * 256 + 256 * 128 + 128 * 3) + 3 + 2 * (512 + 256 + 128)
    # 4x4 kernels 3 -> 128 -> 256 -> 512, linear from 4*4*512 to one logit.
    discriminator = 16 * (3 * 128 + 128 * 256 + 256 * 512) + 128 + 2 * (256 + 512) + 8192 + 1
    assert count == {"generator": generator, "discriminator": discriminator}


def test_residual_discriminator_changes_no_faster_than_its_layers_say():
    net = nets("residual")["discriminator"]
    for _ in range(50):  # each pass improves the estimate of the largest singular value
        net(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            largest = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)
            assert float(largest) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "config, shape, named",
    [
        (GanNetConfig(latent=0), (32, 32, 3), r"model\.latent is 0"),
        (GanNetConfig(generator_channels=0), (32, 32, 3), r"model\.generator_channels is 0"),
        (GanNetConfig(discriminator_channels=-1), (32, 32, 3), r"discriminator_channels is -1"),
        (GanNetConfig(), (28, 28, 3), r"28 x 28.*data\.resize"),
        (GanNetConfig(), (32, 16, 3), r"32 x 16"),
        (GanNetConfig(), (4, 4, 3), r"4 x 4"),
    ],
)
def test_what_does_not_fit_is_named(config, shape, named):
    with pytest.raises(UserError, match=named):
        make_nets(config, shape, None)
