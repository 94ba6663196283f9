"""Public implementations as objectives of our loop: `pip install normflows pythae`.

normflows' Glow: github.com/VincentStimper/normalizing-flows; built like its CIFAR-10 example.
pythae's VAE with its ResNets for CIFAR: github.com/clementchadebec/benchmark_VAE.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.flow.objective import FlowSampleConfig
from dgm.objective import Batch, Nets, Phase
from dgm.preprocessing import DEQUANTIZED, STANDARD, draw_flips, flip_images
from dgm.rng import Draws
from dgm.vae.objective import VAESampleConfig
from shards.reader import Shards

_FIT_IMAGES = 1000


class NormflowsGlow:
    """normflows' Glow, trained by the likelihood of dequantized images in [0, 1]."""

    title = "normflows Glow"
    phases = (Phase("likelihood", "peer"),)
    num_classes = None
    exact = True
    sample_config = FlowSampleConfig()
    pixels = DEQUANTIZED

    def __init__(self, levels: int, steps: int, hidden: int, image_shape: tuple[int, int, int]):
        """Build the net with levels, steps and width of ours."""
        nf = _import("normflows")
        height, width, channels = image_shape
        bases, flows, merges = [], [], []
        for level in range(levels):  # the deepest first
            num_channels = channels << (levels + 1 - level)
            blocks = [nf.flows.GlowBlock(num_channels, hidden) for _ in range(steps)]
            flows.append([*blocks, nf.flows.Squeeze()])
            if level > 0:
                merges.append(nf.flows.Merge())
                num_channels //= 2
            halvings = levels - level
            shape = (num_channels, height >> halvings, width >> halvings)
            bases.append(nf.distributions.DiagGaussian(shape))
        self.net: nn.Module = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return bits per dimension, []."""
        images = flip_images(batch.images, draw_flips(draws))
        nats = self._nats(nets["peer"], images, draws).mean()
        return {"loss": nats / (images[0].numel() * math.log(2))}

    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return -log p of dequantized images, as a probability of grey levels, nats [B]."""
        return {"nll": self._nats(nets["peer"], batch.images, draws)}

    def _nats(self, net: nn.Module, images: Tensor, draws: Draws) -> Tensor:
        x = (DEQUANTIZED.dequantize(images, draws) + 1) / 2
        return net(x) + images[0].numel() * math.log(256)

    def initialize(self, nets: Nets, batch: Batch, draws: Draws) -> None:
        """Initialize its actnorms from a batch."""
        self._nats(nets["peer"], batch.images, draws)

    def fit_to_data(self, images: Shards) -> None:
        """Do nothing: all parameters are learned."""

    @torch.no_grad()
    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Return images in [-1, 1], drawn with torch's random numbers instead of `draws`."""
        net: Any = nets["peer"]
        x, _ = net.sample(count, temperature=self.sample_config.temperature)
        return (2 * x - 1).clamp(-1, 1)


class PythaeVAE:
    """pythae's BetaVAE with its ResNets for CIFAR, as a Gaussian of one variance.

    Its loss, |x - x'|^2 / 2 + beta KL, is the negative bound of N(x', beta) times beta. A grey
    level has the mass of that Gaussian, with the variance that fits the train images best.
    """

    title = "pythae VAE"
    phases = (Phase("autoencode", "peer"),)
    num_classes = None
    exact = False
    sample_config = VAESampleConfig()
    pixels = STANDARD

    def __init__(self, latent: int, image_shape: tuple[int, int, int], variance: float):
        """Build the nets for images of 32 x 32 x 3; raise UserError for others."""
        if image_shape != (32, 32, 3):
            raise UserError(f"pythae's nets are for 32 x 32 x 3, not {image_shape}: resize them")
        models = _import("pythae.models")
        nets = _import("pythae.models.nn.benchmarks.cifar")
        config = models.BetaVAEConfig(
            input_dim=(3, 32, 32), latent_dim=latent, beta=variance, reconstruction_loss="mse"
        )
        self.net: nn.Module = models.BetaVAE(
            config,
            encoder=nets.Encoder_ResNet_VAE_CIFAR(config),
            decoder=nets.Decoder_ResNet_AE_CIFAR(config),
        )
        self.variance = variance

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return its loss, []."""
        output = nets["peer"]({"data": _unit(flip_images(batch.images, draw_flips(draws)))})
        return {"loss": output.loss, "reconstruction": output.recon_loss, "kl": output.reg_loss}

    @torch.no_grad()
    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return the terms of a bound on -log p of stored images, by one draw of z, nats [B]."""
        decoded, kl = self._decode(nets["peer"], batch.images, draws)
        nll = level_nll(_unit(batch.images), decoded, math.sqrt(self.variance))
        return {"reconstruction_nll": nll, "kl": kl}

    def _decode(self, net: Any, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        posterior = net.encoder(_unit(images))
        mean, log_variance = posterior.embedding, posterior.log_covariance
        noise = draws.normal("posterior", tuple(mean.shape[1:]))
        decoded = net.decoder(mean + (0.5 * log_variance).exp() * noise)["reconstruction"]
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return decoded.double(), kl.double()

    @torch.no_grad()
    def fit_to_data(self, images: Shards) -> None:
        """Set the variance that fits the first train images best."""
        rows = np.arange(min(_FIT_IMAGES, len(images)))
        device = next(self.net.parameters()).device
        pixels = torch.from_numpy(images.images(rows)).to(device)
        decoded, _ = self._decode(self.net, pixels, Draws.of(0, torch.from_numpy(rows).to(device)))
        fitted = float((_unit(pixels) - decoded).square().mean())
        print(f"pythae's variance: {self.variance} in training, {fitted:.5f} fits best")
        self.variance = fitted

    @torch.no_grad()
    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Decode latents of the prior."""
        net: Any = nets["peer"]
        z = draws.normal("latent", (net.latent_dim,))
        return 2 * net.decoder(z)["reconstruction"] - 1


def level_nll(x: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Return -log of the mass of N(mean, sigma^2) in the grey levels x = k / 255, nats [B].

    The outermost levels include the tails.
    """
    x, mean = x.double(), mean.double()
    upper = torch.where(x < 1, (x + 0.5 / 255 - mean) / sigma, math.inf)
    lower = torch.where(x > 0, (x - 0.5 / 255 - mean) / sigma, -math.inf)
    # On the side of the nearer tail, to avoid cancellation near 1.
    side = torch.where(lower > 0, -1.0, 1.0)
    mass = side * (torch.special.ndtr(side * upper) - torch.special.ndtr(side * lower))
    return -mass.clamp(min=1e-300).log().flatten(1).sum(1)


def _unit(images: Tensor) -> Tensor:
    """Map uint8 [B, H, W, C] to [B, C, H, W] with 0 at 0 and 255 at 1."""
    return images.permute(0, 3, 1, 2) / 255


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        raise UserError(
            f"{package} is not installed (no module {error.name}): pip install {package}"
        ) from None
