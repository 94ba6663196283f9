"""The invertible layers: inverses and log-determinants."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_flow import moved
from torch import Tensor, nn

from dgm.flow.bijections import ActNorm, Chain, InvertibleConv, Logit, Squeeze
from dgm.flow.coupling import Checkerboard, Coupling, conv_net, residual_net

LAYERS: dict[str, Callable[[], Any]] = {
    "squeeze": Squeeze,
    "logit": lambda: Logit(0.05),
    "actnorm": lambda: ActNorm(4),
    "invertible_conv": lambda: InvertibleConv(4),
    "coupling": lambda: Coupling(conv_net(2, 4, 8)),
    "swapped_coupling": lambda: Coupling(residual_net(2, 4, 8, 1), swap=True),
    "additive_coupling": lambda: Coupling(conv_net(2, 2, 8)),
    "checkerboard": lambda: Checkerboard(residual_net(4, 8, 8, 1), 4, 6, odd=False),
    "odd_checkerboard": lambda: Checkerboard(residual_net(4, 8, 8, 1), 4, 6, odd=True),
    "additive_checkerboard": lambda: Checkerboard(residual_net(4, 4, 8, 1), 4, 6, odd=True),
    "chain": lambda: Chain(
        OrderedDict(actnorm=ActNorm(4), mix=InvertibleConv(4), coupling=Coupling(conv_net(2, 4, 8)))
    ),
}  # fmt: skip


def pixels(count: int, dtype: torch.dtype = torch.float32, channels: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand((count, channels, 4, 6), generator=generator, dtype=torch.float64) * 1.9 - 0.95
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return moved(LAYERS[request.param](), by=0.3)


@torch.no_grad()
def test_inverse_undoes_forward(layer: Any):
    x = pixels(5)
    z, _ = layer(x)
    assert (z.shape != x.shape or (z - x).abs().max() > 0.1) and layer.inverse(z).shape == x.shape
    # float32 has seven digits; a layer scales by e^2 at most.
    assert (layer.inverse(z) - x).abs().max() < 1e-5


def test_log_det_is_that_of_the_jacobian_image_by_image(layer: Any):
    layer.double()
    x = pixels(2, torch.float64)
    with torch.no_grad():
        _, log_det = layer(x)
    assert log_det.shape == (2,)
    for image, found in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda i: layer(i[None])[0].flatten(), image)
        expected = torch.linalg.slogdet(jacobian.reshape(image.numel(), image.numel()))[1]
        assert abs(float(found - expected)) < 1e-10  # rounding of float64 over 96 values


@torch.no_grad()
def test_layers_keep_images_channels_last(layer: Any):
    z, _ = layer(pixels(5))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert layer.inverse(z).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_autocast_reaches_the_networks_of_couplings_only(layer: Any):
    x = pixels(5)
    expected, expected_log_det = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = layer(x)
        back = layer.inverse(z)
    assert z.dtype == log_det.dtype == back.dtype == torch.float32
    if any(isinstance(m, nn.Conv2d) for m in layer.modules()):
        # A network's output then has three digits; the values that it does not transform are exact.
        assert (z - expected).abs().max() < 0.1 and not torch.equal(z, expected)
    else:
        assert torch.equal(z, expected) and torch.equal(log_det, expected_log_det)


def test_squeeze_puts_the_upper_pixels_of_a_square_before_the_lower():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    z, log_det = Squeeze()(x)
    assert z.flatten().tolist() == [0, 1, 2, 3] and z.shape == (1, 4, 1, 1)
    assert log_det.tolist() == [0]
    rgb = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    assert torch.equal(Squeeze()(rgb)[0][1, 3:6, 1, 2], rgb[1, :, 2, 5])  # upper right of a square


def test_logit_keeps_both_ends_finite():
    z, log_det = Logit(0.05)(torch.tensor([-1.0, 0, 1]).reshape(1, 1, 1, 3))
    ends = math.log(0.95 / 0.05)
    torch.testing.assert_close(z.flatten(), torch.tensor([-ends, 0, ends]))
    assert torch.isfinite(log_det).all()


@torch.no_grad()
def test_invertible_conv_of_48_channels_inverts_in_float32_under_autocast_too():
    torch.manual_seed(0)
    mix, x = moved(InvertibleConv(48), by=0.02), pixels(4, channels=48)
    z = mix(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (mix.inverse(z) - x).abs().max() < 1e-4  # W's condition number is in the hundreds


@pytest.mark.parametrize("name", [name for name in LAYERS if "c" in name and "board" in name])
@torch.no_grad()
def test_checkerboard_does_not_change_the_inputs_of_its_network(name: str):
    torch.manual_seed(0)
    layer, x = moved(LAYERS[name](), by=0.3), pixels(3)
    z, _ = layer(x)
    changed = (z != x).all(1).all(0)
    assert torch.equal(changed, layer.free.bool())
    assert bool(changed[0, 0]) == (name == "checkerboard")
    other = torch.where(layer.free.bool(), 1 - x, x)
    assert torch.equal(layer.net(other * (1 - layer.free)), layer.net(x * (1 - layer.free)))


@torch.no_grad()
def test_couplings_begin_as_the_identity_and_scale_by_e_squared_at_most():
    torch.manual_seed(0)
    x = pixels(3)
    for layer in (Coupling(conv_net(2, 4, 8)), Checkerboard(residual_net(4, 8, 8, 1), 4, 6, True)):
        z, log_det = layer(x)
        assert torch.equal(z, x) and not log_det.any()
        layer.net[-1].bias.fill_(1e6)
        values = 4 * 4 * 6 / 2
        torch.testing.assert_close(layer(x)[1], torch.full((3,), 2 * values))
