"""The smallest run of each family: sixteen steps of sixteen images, which take a second."""

from __future__ import annotations

from typing import Any

STEPS, BATCH = 16, 16

_SHARED: dict[str, Any] = {
    "optim": {"lr": 2e-3, "warmup_images": 64},
    "train": {
        "global_batch": BATCH,
        "total_images": STEPS * BATCH,
        "log_every_images": BATCH,
        "save_every_images": 64,
        "sample_every_images": 0,
        "samples_per_class": 1,
        "ema_halflife_images": 100,
        "compile": "none",
    },
}

# Every kind of draw is on: order, flip, timestep, noise, label drop, dropout, latents, changes of
# DiffAugment, dequantisation. The architectures hold what could depend on the batch: BatchNorm,
# spectral norm, actnorm.
TINY: dict[str, dict[str, Any]] = {
    "diffusion": {
        **_SHARED,
        "model": {
            "channels": 8,
            "channel_mult": [1, 2],
            "num_blocks": [1, 1],
            "attention_at": [],
            "patch_size": 2,
            "skips": "add",
            "dropout": 0.1,
        },
        "sample": {"steps": 2},
    },
    "gan": {
        **_SHARED,
        # A GAN's losses part for good once rounding moves a ReLU over its kink: with larger steps
        # that happens within fifty of them, in fp32.
        "optim": {
            "lr": 1e-4,
            "betas": [0.5, 0.999],
            "eps": 1e-6,
            "warmup_images": 0,
            "clip_norm": 0.0,
        },
        "model": {
            "architecture": "residual",
            "latent": 16,
            "generator_channels": 8,
            "discriminator_channels": 8,
        },
        "gan": {
            "loss": "hinge",
            "r1": 0.1,
            "augment": ["color", "translation", "cutout"],
            "discriminator_steps": 2,
            "class_conditional": True,
        },
    },
    "vae": {
        **_SHARED,
        "model": {
            "encoder": "encoder_decoder",
            "decoder": "encoder_decoder",
            "latent": 8,
            "encoder_channels": 4,
            "decoder_channels": 4,
            "channel_mult": [1, 2, 2],
            "num_blocks": [0, 1, 1],
        },
        "vae": {"kl_warmup_images": 128, "free_bits": 0.05},
    },
    "flow": {
        **_SHARED,
        "optim": {"lr": 1e-3, "warmup_images": 64},
        "model": {"architecture": "glow", "levels": 2, "steps": 2, "hidden": 8},
    },
}

# What is watched where one loss has to stand for a family.
LOSS = {
    "diffusion": "train/loss",
    "gan": "train/discriminator/loss",
    "vae": "train/loss",
    "flow": "train/loss",
}

SCRIPTS = {
    "diffusion": "train_ddpm.py",
    "gan": "train_gan.py",
    "vae": "train_vae.py",
    "flow": "train_flow.py",
}
