"""The diffusion objective: what the loop minimises and how to sample from what it trained."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.common.validation import check_range
from dgm.diffusion import likelihood
from dgm.diffusion.config import DiffusionConfig, SampleConfig
from dgm.diffusion.forward_process import Noising
from dgm.diffusion.likelihood import ReverseSteps
from dgm.diffusion.parameterization import (
    Denoised,
    loss_weight,
    target,
    to_x_0_and_eps,
)
from dgm.diffusion.samplers import Denoiser, ddim, ddim_inverse, run_sampler
from dgm.diffusion.schedule import make_schedule
from dgm.objective import Batch, Nets, Phase
from dgm.preprocessing import DEQUANTIZED, STANDARD
from dgm.rng import Draws

_MOST_TIMESTEPS = 100_000
_MAP_STEPS = 50  # of DDIM between noise and images, either way


class DiffusionObjective:
    """Train one net to denoise; sample from it."""

    phases = (Phase("denoise", "net"),)
    exact = False

    def __init__(
        self,
        config: DiffusionConfig,
        sample: SampleConfig,
        image_shape: tuple[int, int, int],
        num_classes: int | None,
        noising: Literal["eager", "compiled", "kernel"] = "eager",
        dtype: torch.dtype = torch.float32,
    ):
        """Prepare for images of shape (H, W, C); raises UserError where settings clash."""
        _check(config, sample)
        self.config, self.sample_config = config, sample
        self.image_shape, self.dtype = image_shape, dtype
        self.num_classes = num_classes if config.class_conditional else None
        self.schedule = make_schedule(
            config.schedule, config.num_timesteps, config.zero_terminal_snr
        )
        self.noising = Noising(
            config.prediction, config.label_drop, self.num_classes or 0, config.flip,
            config.dequantize, noising, keep_x_0=config.learned_variance,
        )  # fmt: skip
        self.pixels = DEQUANTIZED if config.dequantize else STANDARD
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._steps_on_device: dict[torch.device, ReverseSteps] = {}

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Compute the loss of a micro-batch; every named value is a mean over images, []."""
        config, device = self.config, batch.images.device
        alphas, sigmas, snr = self._levels(device)
        shown = self.noising(
            batch.images, batch.labels, alphas, sigmas, draws, self._dtype_of_x_t(device)
        )
        labels = None if self.num_classes is None else shown.told
        output, raw_variance = self._split(nets[phase.net](shown.x_t, shown.t, labels, draws))
        # A sum, for the gradient of a mean is laid out as [B, C, H, W] in memory.
        error = (output - shown.wanted).square().sum((1, 2, 3)) / output[0].numel()
        kind, gamma = config.prediction, config.min_snr_gamma
        weight = loss_weight(kind, config.weighting, snr[shown.t], gamma)
        simple = (weight * error).mean()
        if raw_variance is None:
            return {"loss": simple}
        # The bound teaches the variance only; its gradient to the mean is stopped (section 3.1).
        x_0, x_t, t = shown.x_0, shown.x_t, shown.t
        assert x_0 is not None, "the noising keeps it where the variance is learned"
        x_0_hat, _ = to_x_0_and_eps(kind, output.detach(), x_t, shown.alpha, shown.sigma)
        nats = likelihood.term(
            self.reverse_steps(device), t, x_0, x_t, x_0_hat, (raw_variance + 1) / 2, self.pixels
        )
        bits = (nats / (x_0[0].numel() * math.log(2))).mean() * config.num_timesteps
        loss = simple + config.vlb_weight * bits
        return {"loss": loss, "loss_simple": simple, "vlb_bits_per_dim": bits}

    @torch.no_grad()
    def sample(
        self,
        nets: Nets,
        count: int,
        labels: Tensor | None,
        draws: Draws,
        **knobs: Any,
    ) -> Tensor:
        """Make `count` images, [count, C, H, W] in [-1, 1]; image i by the draws of index i.

        `knobs` replace entries of the run's SampleConfig.
        """
        config = SampleConfig(**{**vars(self.sample_config), **knobs})
        _check(self.config, config)
        made = []
        size = min(config.batch, count)
        for start in range(0, count, size):
            first = min(start, count - size)  # compiled code meets one size, for the last one too
            part = slice(first, first + size)
            own = draws.part(part)
            own_labels = None if labels is None or self.num_classes is None else labels[part]
            denoiser = self.denoiser(nets["net"], own_labels, config.guidance, config.clip)
            latent = own.normal("latent", self.image_shape, self.dtype).permute(0, 3, 1, 2)
            x = run_sampler(
                config.sampler, denoiser, latent, self.schedule, own,
                config.steps, config.eta, config.variance,
            )  # fmt: skip
            made.append(x[start - first :].clamp(-1, 1))
        return torch.cat(made)

    def latents(self, draws: Draws) -> Tensor:
        """Draw the noise that samples begin with, [B, D]."""
        return draws.normal("latent", self.image_shape, self.dtype).permute(0, 3, 1, 2).flatten(1)

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Find the noise [B, D] of which `decode` makes these images, for their classes."""
        denoiser = self.denoiser(nets["net"], batch.labels, clip=False)
        x_0 = self.pixels.scale(batch.images, self.dtype)
        steps = min(_MAP_STEPS, self.config.num_timesteps)
        return ddim_inverse(denoiser, x_0, self.schedule, steps).flatten(1)

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None) -> Tensor:
        """Map noise to images in [-1, 1] by DDIM, which draws none of its own: a fixed map."""
        height, width, channels = self.image_shape
        denoiser = self.denoiser(nets["net"], labels, clip=False)
        x = z.unflatten(1, (channels, height, width)).to(memory_format=torch.channels_last)
        unused = Draws.of(0, torch.arange(len(z), device=z.device))
        steps = min(_MAP_STEPS, self.config.num_timesteps)
        return ddim(denoiser, x, self.schedule, unused, steps).clamp(-1, 1)

    @torch.no_grad()
    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Bound -log p of stored images from above, nats: named terms, each [B].

        `decoder` is L_0, `steps` the sum of L_1 to L_{T-1}, `prior` L_T; one forward pass per t.
        The variance of a step is the learned one, or as `sample.variance` says.
        """
        terms = self.nats_by_timestep(nets, batch, draws)
        prior = likelihood.prior(self.schedule, self.pixels.scale(batch.images, self.dtype))
        return {"decoder": terms[:, 0], "steps": terms[:, 1:].sum(1), "prior": prior}

    @torch.no_grad()
    def nats_by_timestep(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Compute the bound's terms L_0 to L_{T-1} of stored images, nats [B, T]."""
        device, variance = batch.images.device, self.sample_config.variance
        alphas, sigmas, _ = self._levels(device)
        labels = None if self.num_classes is None else batch.labels
        denoiser = self.denoiser(nets["net"], labels, clip=True)
        x_0, terms = self.pixels.scale(batch.images, self.dtype), []
        fixed: Literal["small", "large"] = "small" if variance == "small" else "large"
        for t in range(self.config.num_timesteps):
            eps = draws.at(t).normal("likelihood", self.image_shape, self.dtype)
            x_t = alphas[t] * x_0 + sigmas[t] * eps.permute(0, 3, 1, 2)
            said = denoiser(x_t, t)
            times = torch.full((len(x_0),), t, device=device)
            chosen = fixed if said.variance_fraction is None else said.variance_fraction
            terms.append(
                likelihood.term(
                    self.reverse_steps(device), times, x_0, x_t, said.x_0, chosen, self.pixels
                )
            )
        return torch.stack(terms, dim=1)

    @torch.no_grad()
    def errors_at(self, nets: Nets, batch: Batch, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Measure stored images noised to timesteps t, int64 [B]: each [B], a mean over pixels.

        The error that the training weighs and averages, and the squared error of eps.
        """
        alphas, sigmas, snr = self._levels(batch.images.device)
        alpha, sigma = (levels[t][:, None, None, None] for levels in (alphas, sigmas))
        x_0 = self.pixels.scale(batch.images, self.dtype)
        eps = draws.normal("noise", self.image_shape, self.dtype).permute(0, 3, 1, 2)
        x_t = alpha * x_0 + sigma * eps
        labels = None if self.num_classes is None else batch.labels
        output = self._split(nets["net"](x_t, t, labels))[0].to(self.dtype)
        kind, weighting = self.config.prediction, self.config.weighting
        error = (output - target(kind, x_0, eps, alpha, sigma)).square().flatten(1).mean(1)
        weight = loss_weight(kind, weighting, snr[t], self.config.min_snr_gamma)
        eps_hat = to_x_0_and_eps(kind, output, x_t, alpha, sigma)[1]
        return weight * error, (eps_hat - eps).square().flatten(1).mean(1)

    def denoiser(
        self, net: nn.Module, labels: Tensor | None, guidance: float = 1.0, clip: bool = True
    ) -> Denoiser:
        """Wrap a net as a denoiser of images of these classes (None: of no class).

        Guidance w gives `out_none + w (out_class - out_none)` (Ho and Salimans 2022, equation 6,
        whose w counts from 0); both halves go through the net in one forward pass.
        """
        guided = labels is not None and guidance != 1.0

        def denoise(x_t: Tensor, t: int) -> Denoised:
            alphas, sigmas, _ = self._levels(x_t.device)
            times = torch.full((len(x_t) * (2 if guided else 1),), t, device=x_t.device)
            inputs = torch.cat([x_t, x_t]) if guided else x_t
            told = self._told(labels, len(x_t), x_t.device, guided)
            output, raw_variance = self._split(net(inputs, times, told))
            if guided:
                with_class, without = output.chunk(2)
                output = without + guidance * (with_class - without)
                raw_variance = None if raw_variance is None else raw_variance.chunk(2)[0]
            output = output.to(x_t.dtype)
            x_0, eps = to_x_0_and_eps(self.config.prediction, output, x_t, alphas[t], sigmas[t])
            if clip:
                x_0 = x_0.clamp(-1, 1)
                eps = (x_t - alphas[t] * x_0) / sigmas[t]
            fraction = None if raw_variance is None else (raw_variance.to(x_t.dtype) + 1) / 2
            return Denoised(x_0, eps, fraction)

        return denoise

    def _told(
        self, labels: Tensor | None, count: int, device: torch.device, guided: bool
    ) -> Tensor | None:
        if self.num_classes is None:
            return None
        nobody = torch.full((count,), self.num_classes, device=device)
        if labels is None:
            return nobody
        return torch.cat([labels, nobody]) if guided else labels

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.config.learned_variance:
            return output, None
        mean, variance = output.chunk(2, dim=1)
        return mean, variance

    def _dtype_of_x_t(self, device: torch.device) -> torch.dtype:
        """Give the type that the net begins to compute in, so that x_t is stored in it at once."""
        rounded = torch.is_autocast_enabled(device.type) and not self.config.learned_variance
        return torch.get_autocast_dtype(device.type) if rounded else self.dtype

    def reverse_steps(self, device: torch.device) -> ReverseSteps:
        """Return the coefficients of the bound's terms, on a device."""
        if device not in self._steps_on_device:
            self._steps_on_device[device] = ReverseSteps.of(self.schedule, device, self.dtype)
        return self._steps_on_device[device]

    def _levels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on_device:
            levels = (self.schedule.alphas, self.schedule.sigmas, self.schedule.snr)
            alphas, sigmas, snr = (level.to(device, self.dtype) for level in levels)
            self._on_device[device] = alphas, sigmas, snr
        return self._on_device[device]


def _check(config: DiffusionConfig, sample: SampleConfig) -> None:
    check_range(config, "diffusion.", "num_timesteps", min=2, max=_MOST_TIMESTEPS)
    if config.zero_terminal_snr and config.prediction == "eps":
        raise UserError(
            "diffusion.zero_terminal_snr true leaves diffusion.prediction 'eps' nothing to learn "
            "at the last timestep: choose v or x_0"
        )
    check_range(config, "diffusion.", "label_drop", min=0, max=1)
    check_range(config, "diffusion.", "min_snr_gamma", above=0)
    check_range(config, "diffusion.", "vlb_weight", min=0)
    check_range(sample, "sample.", "guidance", min=0)
    if sample.guidance != 1 and (config.label_drop == 0 or not config.class_conditional):
        raise UserError(
            f"sample.guidance is {sample.guidance}, but the run trains without "
            "diffusion.class_conditional or with diffusion.label_drop 0: set it to 1"
        )
    if sample.variance == "learned" and not config.learned_variance:
        raise UserError(
            "sample.variance is 'learned', but diffusion.learned_variance is false: "
            "choose small or large"
        )
    if not 1 <= sample.steps <= config.num_timesteps:
        raise UserError(
            f"sample.steps is {sample.steps}: choose 1 to {config.num_timesteps}, "
            "which is diffusion.num_timesteps"
        )
    if not 0 <= sample.eta <= 1:
        raise UserError(f"sample.eta is {sample.eta}: choose 0 (no noise) to 1 (as much as DDPM)")
    check_range(sample, "sample.", "batch", min=1)
