"""The U-Net: DDPM's size, its variants, where its gradient goes, and its dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgm.diffusion.unet import ProgressiveSkips, UNet, UNetBlock, UNetConfig
from dgm.rng import Draws

TINY = UNetConfig(channels=8, channel_mult=[1, 2], num_blocks=[1, 2], attention_at=[], dropout=0.2)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention_at": [8, 4]},
    "heads": {"attention_at": [4], "num_heads": 2},
    "add": {"skips": "add"},
    "add with attention": {"skips": "add", "attention_at": [4]},
    "patch": {"patch_size": 2},
    "patch and add": {"patch_size": 2, "skips": "add"},
    "scale and shift": {"scale_shift": True},
    "one level": {"channel_mult": [1], "num_blocks": [1]},
    "three levels": {"channel_mult": [1, 1, 3], "num_blocks": [1, 1, 2], "skips": "add"},
    "pyramid": {"pyramid": True},
    "pyramid of three": {
        "channel_mult": [1, 1, 2],
        "num_blocks": [1, 1, 1],
        "skips": "add",
        "pyramid": True,
    },
    "pyramid and patch": {"patch_size": 2, "skips": "add", "pyramid": True},
    "pyramid of one level": {"channel_mult": [1], "num_blocks": [1], "pyramid": True},
    "narrowing": {"channel_mult": [3, 1], "skips": "add"},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def perturbed(net: UNet) -> UNet:
    """Perturb all weights, as some start at zero and would hide the layers before them."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.double()


def inputs(count: int = 2) -> tuple[Tensor, Tensor, Tensor, Draws]:
    """Return x, t, labels and draws of some images."""
    x = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    index = torch.arange(count)
    return x, 100 * index, index % 5, Draws.of(0, index, 3)


def test_ddpm_for_cifar10_has_its_number_of_parameters():
    # The count of the network that Ho et al. 2020 published (35.7 M in their appendix B).
    with torch.device("meta"):
        net = UNet(UNetConfig(), 32)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


@variants
def test_output_has_the_given_channels_and_starts_at_zero(variant: dict[str, Any]):
    net = UNet(replace(TINY, **variant), 8, output_channels=6, num_classes=5)
    x, t, labels, draws = inputs()
    made = net(x.float(), t, labels, draws)
    assert made.shape == (2, 6, 8, 8)
    assert not made.any()


@variants
def test_gradient_reaches_every_parameter(variant: dict[str, Any]):
    net = perturbed(UNet(replace(TINY, **variant), 8, num_classes=5))
    x, t, labels, draws = inputs()
    (net(x, t, labels, draws) * torch.randn_like(x)).sum().backward()
    untouched = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@variants
def test_output_depends_on_image_time_and_class(variant: dict[str, Any]):
    net = perturbed(UNet(replace(TINY, **variant), 8, num_classes=5))
    x, t, labels, _ = inputs()
    base = net(x, t, labels)
    assert not torch.allclose(base, net(x.flip(0), t, labels))
    assert not torch.allclose(base, net(x, t + 50, labels))
    assert not torch.allclose(base, net(x, t, labels + 1))
    assert not torch.allclose(base, net(x, t, torch.full_like(labels, 5)))  # no class


@variants
def test_channels_last_is_kept_throughout(variant: dict[str, Any]):
    net = UNet(replace(TINY, **variant), 8, num_classes=5).to(memory_format=torch.channels_last)
    seen: list[bool] = []

    def see(_: nn.Module, given: tuple[Tensor, ...], made: Tensor | tuple[Tensor, ...]) -> None:
        made = made[0] if isinstance(made, tuple) else made
        # With one channel or position both formats coincide.
        seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
        seen.append(made.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, UNetBlock | nn.Conv2d):
            module.register_forward_hook(see)
    x, t, labels, draws = inputs()
    net(x.float().to(memory_format=torch.channels_last), t, labels, draws)
    assert len(seen) > 10 and all(seen)


@variants
def test_an_image_does_not_depend_on_its_batch(variant: dict[str, Any]):
    net = perturbed(UNet(replace(TINY, **variant), 8, num_classes=5))
    x, t, labels, draws = inputs(6)
    whole = net(x, t, labels, draws)
    for size in (1, 2, 3):
        parts = [
            net(x[rows], t[rows], labels[rows], Draws.of(0, rows, 3))
            for rows in torch.arange(6).split(size)
        ]
        # Float64 rounding only; another dropout mask would change numbers by their own size.
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-11)


def test_dropout_acts_only_with_draws():
    net = perturbed(UNet(TINY, 8))
    x, t, _, draws = inputs()
    off = net(x, t)
    assert torch.equal(off, net(x, t))  # no generator state
    net.eval()
    assert torch.equal(off, net(x, t))
    assert not torch.allclose(off, net(x, t, None, draws))
    assert not torch.allclose(net(x, t, None, draws), net(x, t, None, draws.at(4)))
    none = UNet(replace(TINY, dropout=0.0), 8).double()
    none.load_state_dict(net.state_dict())
    assert torch.equal(off, none(x, t, None, draws))


def test_a_class_conditional_net_needs_labels():
    net = UNet(TINY, 8, num_classes=5)
    x, t, _, _ = inputs()
    with pytest.raises(AssertionError, match="labels"):
        net(x.float(), t)


def test_each_level_of_progressive_skips_has_its_own_size():
    skips = ProgressiveSkips([8, 16], [16, 24], first_factor=2, image_channels=3, outputs=3)
    x = torch.zeros(1, 3, 8, 8)
    x[:, :, 7, 7] = 1
    for level, (in_width, out_width, side) in enumerate([(8, 16, 4), (16, 24, 2)]):
        features = skips.input(level, x) - skips.input(level, torch.zeros_like(x))
        assert features.shape == (1, in_width, side, side)
        # A pixel reaches its own position and the neighbors of a 3 x 3 convolution.
        assert (features[0, :, side - 2 :, side - 2 :] != 0).all()
        assert (features[0, :, : side - 2] == 0).all()
        skips.says[level][2].bias.data.fill_(level + 1)
        out = skips.output(level, torch.randn(1, out_width, side, side))
        torch.testing.assert_close(out, torch.full((1, 3, 8, 8), level + 1.0))
