"""The GAN objective: discriminator and generator, trained in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dgm.common.errors import UserError
from dgm.common.progress import advance
from dgm.common.validation import check_range
from dgm.gan.diffaugment import Augmentation, augment
from dgm.gan.losses import LossName, discriminator_loss, generator_loss, r1_penalty
from dgm.latent_space import slerp_path
from dgm.nn.compiling import uncompiled
from dgm.objective import Batch, Nets, Phase
from dgm.preprocessing import STANDARD, draw_flips, flip_images
from dgm.rng import Draws


@dataclass(frozen=True)
class GanConfig:
    """Loss and regularization of both networks; the defaults are DCGAN's."""

    loss: LossName = "non_saturating"
    """Loss of both: non_saturating, hinge or least_squares."""
    r1: float = 0.0
    """Weight gamma of the R1 penalty gamma / 2 |gradient|^2 on real images; 0 turns it off."""
    r1_interval: int = 1
    """Discriminator steps per R1 penalty, which is scaled by this number (lazy regularization)."""
    augment: list[Augmentation] = field(default_factory=list)
    """DiffAugment of real and generated images: any of color, translation, cutout."""
    augment_probability: float = 1.0
    """Probability of each augmentation; below 0.8 they do not leak into generated images."""
    discriminator_steps: int = 1
    """Discriminator steps per generator step."""
    discriminator_lr: float | None = None
    """Learning rate of the discriminator; null is optim.lr."""
    class_conditional: bool = False
    """Condition both networks on the class."""
    flip: bool = True
    """Mirror each real image with probability 1/2."""


@dataclass(frozen=True)
class GanSampleConfig:
    """How images are sampled from a trained generator."""

    temperature: float = 1.0
    """Standard deviation of the latents; below 1 for more typical, less varied images."""
    batch: int = 250
    """Images per forward pass of each process; has no effect on the images."""


class GanObjective:
    """Train a discriminator to tell real from generated images, and a generator to fool it."""

    whole_batch = True  # because of BatchNorm
    pixels = STANDARD

    def __init__(
        self,
        config: GanConfig,
        sample: GanSampleConfig,
        latent: int,
        num_classes: int,
        dtype: torch.dtype = torch.float32,
        sees_batch: bool = True,
    ):
        """Set up for latents of `latent` dimensions; raise UserError for invalid settings.

        `sees_batch`: each logit of the discriminator depends on its whole batch (BatchNorm).
        """
        _check(config, sample)
        if config.r1 > 0 and sees_batch:
            raise UserError(
                f"gan.r1 is {config.r1}, but R1 needs logits that depend on one image each, and "
                "BatchNorm in the discriminator mixes the batch: set "
                "model.discriminator_batch_norm false, or gan.r1 0"
            )
        self.config, self.sample_config, self.sees_batch = config, sample, sees_batch
        self.latent, self.dtype = latent, dtype
        self.num_classes = num_classes if config.class_conditional else None
        self.phases = (
            Phase("discriminator", "discriminator", average=False),
            Phase("generator", "generator", every=config.discriminator_steps),
        )

    def loss(self, nets: Nets, batch: Batch, phase: Phase, draws: Draws) -> dict[str, Tensor]:
        """Return the loss of the phase's network; every named value is a mean over images, [].

        `r1` is present only in steps that have the penalty.
        """
        config, net, name = self.config, nets["discriminator"], phase.name
        labels = None if self.num_classes is None else batch.labels
        fake = nets["generator"](self._latent(draws, name), labels).to(self.dtype)
        fake = self._augmented(fake, draws, f"{name}/augment_fake")
        if name == "generator" and not self.sees_batch:
            logits_fake = net(fake, labels).to(self.dtype)
        else:
            # Real and generated images in one forward pass, in the generator's phase too, so that
            # BatchNorm has the statistics of the discriminator's.
            images = batch.images
            if config.flip:
                images = flip_images(images, draw_flips(draws))
            real = self.pixels.scale(images, self.dtype)
            both = torch.cat([self._augmented(real, draws, f"{name}/augment_real"), fake])
            logits = net(both, None if labels is None else labels.repeat(2)).to(self.dtype)
            logits_real, logits_fake = logits.chunk(2)
        if name == "generator":
            loss = generator_loss(config.loss, logits_fake).mean()
            return {"loss": loss, "logits_fake": logits_fake.mean()}
        loss_real, loss_fake = discriminator_loss(config.loss, logits_real, logits_fake)
        values = {"loss_real": loss_real.mean(), "loss_fake": loss_fake.mean()}
        total = values["loss_real"] + values["loss_fake"]
        if self.variant(phase, batch.step):
            values["r1"] = self._r1(net, real, labels, draws).mean()
            total = total + 0.5 * config.r1 * config.r1_interval * values["r1"]
        correct = torch.cat([logits_real > 0, logits_fake <= 0]).to(self.dtype)
        return {
            "loss": total,
            **values,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
            "accuracy": correct.mean(),
        }

    def variant(self, phase: Phase, step: int) -> bool:
        """Return whether this step has the R1 penalty."""
        due = self.config.r1 > 0 and step % self.config.r1_interval == 0
        return due and phase.name == "discriminator"

    def _r1(self, net: nn.Module, real: Tensor, labels: Tensor | None, draws: Draws) -> Tensor:
        """Return the R1 penalty of each real image, [B].

        Its own forward pass is never compiled, since AOTAutograd cannot differentiate twice, and
        reuses the spectral norms of the pass before it.
        """
        real, training = real.detach().requires_grad_(), net.training
        net.eval()  # in which spectral norm does no power iteration
        try:
            with uncompiled():
                logits = net(self._augmented(real, draws, "discriminator/augment_real"), labels)
                return r1_penalty(logits.to(self.dtype), real)
        finally:
            net.train(training)

    def _augmented(self, x: Tensor, draws: Draws, purpose: str) -> Tensor:
        return augment(x, self.config.augment, draws, purpose, self.config.augment_probability)

    def _latent(self, draws: Draws, purpose: str) -> Tensor:
        return draws.normal(f"{purpose}/latent", (self.latent,), self.dtype)

    def latents(self, draws: Draws) -> Tensor:
        """Draw the latents of samples, [B, latent]."""
        return self._latent(draws, "sample")

    def decode(self, nets: Nets, z: Tensor, labels: Tensor | None) -> Tensor:
        """Return the images of latents, [B, C, H, W] in [-1, 1]."""
        return nets["generator"](z, None if self.num_classes is None else labels).to(self.dtype)

    @torch.no_grad()
    def sample(
        self, nets: Nets, count: int, labels: Tensor | None, draws: Draws, **knobs: Any
    ) -> Tensor:
        """Sample `count` images, [count, C, H, W] in [-1, 1]; image i by the draws of index i."""
        config = GanSampleConfig(**{**vars(self.sample_config), **knobs})
        _check(self.config, config)
        latent = config.temperature * self.latents(draws)
        if self.num_classes is None:
            labels = None
        elif labels is None:
            labels = draws.integers("sample/label", self.num_classes)
        return self._generate(nets, latent, labels, config.batch)

    def _generate(self, nets: Nets, latent: Tensor, labels: Tensor | None, batch: int) -> Tensor:
        parts = []
        for start in range(0, len(latent), batch):
            part = slice(start, start + batch)
            part_labels = None if labels is None else labels[part]
            parts.append(self.decode(nets, latent[part], part_labels))
            advance(len(parts[-1]))
        return torch.cat(parts)

    @torch.no_grad()
    def visualize(self, nets: Nets, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Return spherical interpolations between latents: `interpolation`, [rows, 10, C, H, W]."""
        rows = len(batch.labels) // 2
        start, end = self._latent(draws, "picture")[: 2 * rows].chunk(2)
        path = slerp_path(start, end, 10)
        labels = None
        if self.num_classes is not None:
            labels = batch.labels[:rows].repeat_interleave(10)
        images = self._generate(nets, path.flatten(0, 1), labels, self.sample_config.batch)
        return {"interpolation": images.unflatten(0, (rows, 10))}


def _check(config: GanConfig, sample: GanSampleConfig) -> None:
    check_range(config, "gan.", "r1", min=0)
    check_range(config, "gan.", "r1_interval", "discriminator_steps", min=1)
    check_range(config, "gan.", "discriminator_lr", above=0)
    if len(set(config.augment)) < len(config.augment):
        raise UserError(f"gan.augment is {config.augment}: name each augmentation once")
    check_range(config, "gan.", "augment_probability", above=0, max=1)
    check_range(sample, "sample.", "temperature", above=0)
    check_range(sample, "sample.", "batch", min=1)
