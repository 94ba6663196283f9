"""The parts of a GAN: losses, penalty, augmentation, BatchNorm, networks."""

from __future__ import annotations

import pytest
import torch
from small_gan import ARCHITECTURES, LATENT, NUM_CLASSES, nets
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.gan.batch_norm import BatchNorm
from dgm.gan.diffaugment import augment
from dgm.gan.losses import discriminator_loss, generator_loss
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


def test_augmentation_is_applied_with_its_probability():
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


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("classes", [None, NUM_CLASSES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_discriminator_takes_the_generators_images(architecture, classes, side):
    made = nets(architecture, classes, side)
    labels = None if classes is None else torch.arange(5) % classes
    images = made["generator"](torch.randn(5, LATENT, dtype=torch.float64), labels)
    assert images.shape == (5, 3, side, side) and images.abs().max() <= 1
    assert made["discriminator"](images, labels).shape == (5,)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_changes_images_and_logits(architecture):
    made = nets(architecture, NUM_CLASSES)
    for net in made.values():
        for module in net.modules():  # whose scales start equal for all classes
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


def test_spectral_norm_of_the_residual_discriminators_layers_is_one():
    net = nets("residual")["discriminator"]
    for _ in range(50):  # each pass improves the estimate of the largest singular value
        net(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            largest = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)
            assert float(largest) == pytest.approx(1, abs=0.02)


def test_other_sizes_are_refused():
    for height, width in ((32, 16), (4, 4)):
        with pytest.raises(UserError, match=f"{height} x {width}"):
            make_nets(GanNetConfig(), (height, width, 3), None)
