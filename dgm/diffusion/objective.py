"""The diffusion objective: training loss, sampling, the latent map and the variational bound."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dgm.diffusion.config import DiffusionConfig, DiffusionSampleConfig, check_settings
from dgm.diffusion.forward_process import Backend, ForwardProcess
from dgm.diffusion.likelihood import ReverseSteps, bound_term, prior_kl
from dgm.diffusion.parameterization import (
    Denoised,
    loss_weight,
    q_sample,
    to_prediction,
    to_x_0_and_eps,
)
from dgm.diffusion.samplers import Denoiser, ddim, ddim_inverse, run_sampler
from dgm.diffusion.schedule import make_schedule
from dgm.objective import Batch, Nets, Phase
from dgm.preprocessing import DEQUANTIZED, STANDARD
from dgm.rng import Draws

_MAP_STEPS = 50  # DDIM steps between noise and images, in either direction


class _Tables(NamedTuple):
    """Values of each timestep, [T] on a device."""

    alphas: Tensor
    sigmas: Tensor
    snr: Tensor
    reverse_steps: ReverseSteps


class DiffusionObjective:
    """Train one network to denoise; sample from it."""

    phases = (Phase("denoise", "net"),)
    exact = False

    def __init__(
        self,
        config: DiffusionConfig,
        sample: DiffusionSampleConfig,
        image_shape: tuple[int, int, int],
        num_classes: int | None,
        backend: Backend = "eager",
        dtype: torch.dtype = torch.float32,
    ):
        """Set up for images of shape (H, W, C); raise UserError for settings in conflict."""
        check_settings(config, sample)
        self.config, self.sample_config = config, sample
        self.image_shape, self.dtype = image_shape, dtype
        self.num_classes = num_classes if config.class_conditional else None
        self.schedule = make_schedule(
            config.schedule, config.num_timesteps, config.zero_terminal_snr
        )
        self.forward_process = ForwardProcess(
            config.prediction, config.label_drop, self.num_classes or 0, config.flip,
            config.dequantize, backend, keep_x_0=config.learned_variance,
        )  # fmt: skip
        self.pixels = DEQUANTIZED if config.dequantize else STANDARD
        self._tables_on: dict[torch.device, _Tables] = {}

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return the loss of a micro-batch; every named value is a mean over images, []."""
        config, device = self.config, batch.images.device
        tables = self._tables(device)
        # x_t is stored in the dtype that the network starts to compute in.
        rounded = torch.is_autocast_enabled(device.type) and not config.learned_variance
        dtype = torch.get_autocast_dtype(device.type) if rounded else self.dtype
        x_t, target, t, labels, alpha, sigma, x_0 = self.forward_process(
            batch.images, batch.labels, tables.alphas, tables.sigmas, draws, dtype
        )
        given_labels = None if self.num_classes is None else labels
        prediction, variance = self._split(nets[phase.net](x_t, t, given_labels, draws))
        # A sum, because the gradient of a mean is laid out as [B, C, H, W] in memory.
        error = (prediction - target).square().sum((1, 2, 3)) / prediction[0].numel()
        weight = loss_weight(
            config.prediction, config.weighting, tables.snr[t], config.min_snr_gamma
        )
        simple = (weight * error).mean()
        if variance is None:
            return {"loss": simple}
        # The bound trains the variance only: its gradient with respect to the mean is stopped
        # (Nichol and Dhariwal 2021, section 3.1).
        assert x_0 is not None, "the forward process keeps x_0 where the variance is learned"
        x_0_hat, _ = to_x_0_and_eps(config.prediction, prediction.detach(), x_t, alpha, sigma)
        fraction = (variance + 1) / 2
        nats = bound_term(tables.reverse_steps, t, x_0, x_t, x_0_hat, fraction, self.pixels)
        bits = (nats / (x_0[0].numel() * math.log(2))).mean() * config.num_timesteps
        loss = simple + config.vlb_weight * bits
        return {"loss": loss, "loss_simple": simple, "vlb_bits_per_dim": bits}

    @torch.no_grad()
    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Sample `count` images, [count, C, H, W] in [-1, 1]; image i by the draws of index i.

        `knobs` replace fields of the run's DiffusionSampleConfig.
        """
        config = DiffusionSampleConfig(**{**vars(self.sample_config), **knobs})
        check_settings(self.config, config)
        parts = []
        size = min(config.batch, count)
        for start in range(0, count, size):
            first = min(start, count - size)  # the last batch is full too: nothing recompiles
            rows = slice(first, first + size)
            part_draws, part_labels = draws.part(rows), None if labels is None else labels[rows]
            denoiser = self.denoiser(nets["net"], part_labels, config.guidance, config.clip)
            x = run_sampler(
                config.sampler, denoiser, self.noise(part_draws, "latent"), self.schedule,
                part_draws, config.steps, config.eta, config.variance,
            )  # fmt: skip
            parts.append(x[start - first :].clamp(-1, 1))
        return torch.cat(parts)

    def noise(self, draws: Draws, purpose: str) -> Tensor:
        """Draw standard normal images, [B, C, H, W] channels_last."""
        return draws.normal(purpose, self.image_shape, self.dtype).permute(0, 3, 1, 2)

    def latents(self, draws: Draws) -> Tensor:
        """Draw the noise that sampling starts from, [B, D]."""
        return self.noise(draws, "latent").flatten(1)

    def encode(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Return the noise [B, D] that `decode` maps to these images, given their classes."""
        denoiser = self.denoiser(nets["net"], batch.labels, clip=False)
        x_0 = self.pixels.scale(batch.images, self.dtype)
        steps = min(_MAP_STEPS, self.config.num_timesteps)
        return ddim_inverse(denoiser, x_0, self.schedule, steps).flatten(1)

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None) -> Tensor:
        """Map noise to images in [-1, 1] by deterministic DDIM (eta 0)."""
        height, width, channels = self.image_shape
        denoiser = self.denoiser(nets["net"], labels, clip=False)
        x = z.unflatten(1, (channels, height, width)).to(memory_format=torch.channels_last)
        unused = Draws.of(0, torch.arange(len(z), device=z.device))
        steps = min(_MAP_STEPS, self.config.num_timesteps)
        return ddim(denoiser, x, self.schedule, unused, steps).clamp(-1, 1)

    @torch.no_grad()
    def nats(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return the terms of the bound on -log p of stored images, nats, each [B].

        `decoder` is L_0, `steps` the sum of L_1 to L_{T-1}, `prior` L_T; one forward pass per t.
        The variance of a step is the learned one, or the one of `sample.variance`.
        """
        terms = self.nats_by_timestep(nets, batch, draws)
        prior = prior_kl(self.schedule, self.pixels.scale(batch.images, self.dtype))
        return {"decoder": terms[:, 0], "steps": terms[:, 1:].sum(1), "prior": prior}

    @torch.no_grad()
    def nats_by_timestep(self, nets: Nets, batch: Batch, draws: Draws) -> Tensor:
        """Return the bound's terms L_0 to L_{T-1} of stored images, nats [B, T]."""
        tables = self._tables(batch.images.device)
        denoiser = self.denoiser(nets["net"], batch.labels, clip=True)
        x_0, terms = self.pixels.scale(batch.images, self.dtype), []
        fixed: Literal["small", "large"] = (
            "small" if self.sample_config.variance == "small" else "large"
        )
        for t in range(self.config.num_timesteps):
            eps = self.noise(draws.at(t), "likelihood")
            x_t = q_sample(x_0, eps, tables.alphas[t], tables.sigmas[t])
            x_0_hat, _, fraction = denoiser(x_t, t)
            times = torch.full((len(x_0),), t, device=x_0.device)
            variance = fixed if fraction is None else fraction
            terms.append(
                bound_term(tables.reverse_steps, times, x_0, x_t, x_0_hat, variance, self.pixels)
            )
        return torch.stack(terms, dim=1)

    @torch.no_grad()
    def errors_at(self, nets: Nets, batch: Batch, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return errors of stored images noised to timesteps t, int64 [B]; means over pixels, [B].

        The first is weighted as in training, the second is the squared error of eps.
        """
        tables, kind = self._tables(batch.images.device), self.config.prediction
        alpha, sigma = (values[t][:, None, None, None] for values in tables[:2])
        x_0, eps = self.pixels.scale(batch.images, self.dtype), self.noise(draws, "noise")
        x_t = q_sample(x_0, eps, alpha, sigma)
        labels = None if self.num_classes is None else batch.labels
        prediction = self._split(nets["net"](x_t, t, labels))[0].to(self.dtype)
        target = to_prediction(kind, x_0, eps, alpha, sigma)
        error = (prediction - target).square().flatten(1).mean(1)
        weight = loss_weight(kind, self.config.weighting, tables.snr[t], self.config.min_snr_gamma)
        eps_hat = to_x_0_and_eps(kind, prediction, x_t, alpha, sigma)[1]
        return weight * error, (eps_hat - eps).square().flatten(1).mean(1)

    def denoiser(
        self, net: nn.Module, labels: Tensor | None, guidance: float = 1.0, clip: bool = True
    ) -> Denoiser:
        """Wrap a network as a denoiser of images with these labels (None: unconditional).

        Guidance w is `out_null + w (out_class - out_null)` (Ho and Salimans 2022, equation 6,
        whose w is smaller by 1); both halves go through the network in one forward pass.
        """
        labels = None if self.num_classes is None else labels
        guided = labels is not None and guidance != 1.0
        kind = self.config.prediction

        def denoise(x_t: Tensor, t: int) -> Denoised:
            alphas, sigmas, *_ = self._tables(x_t.device)
            inputs = torch.cat([x_t, x_t]) if guided else x_t
            times = torch.full((len(inputs),), t, device=x_t.device)
            given = labels
            if self.num_classes is not None and (labels is None or guided):
                null = torch.full((len(x_t),), self.num_classes, device=x_t.device)
                given = null if labels is None else torch.cat([labels, null])
            prediction, variance = self._split(net(inputs, times, given))
            if guided:
                with_class, without = prediction.chunk(2)
                prediction = without + guidance * (with_class - without)
                variance = None if variance is None else variance.chunk(2)[0]
            prediction = prediction.to(x_t.dtype)
            x_0, eps = to_x_0_and_eps(kind, prediction, x_t, alphas[t], sigmas[t])
            if clip:
                x_0, eps = to_x_0_and_eps("x_0", x_0.clamp(-1, 1), x_t, alphas[t], sigmas[t])
            fraction = None if variance is None else (variance.to(x_t.dtype) + 1) / 2
            return Denoised(x_0, eps, fraction)

        return denoise

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output into prediction and raw variance in [-1, 1], if learned."""
        if not self.config.learned_variance:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def _tables(self, device: torch.device) -> _Tables:
        if device not in self._tables_on:
            schedule = self.schedule
            levels = (schedule.alphas, schedule.sigmas, schedule.snr)
            alphas, sigmas, snr = (values.to(device, self.dtype) for values in levels)
            reverse_steps = ReverseSteps.of(schedule, device, self.dtype)
            self._tables_on[device] = _Tables(alphas, sigmas, snr, reverse_steps)
        return self._tables_on[device]
