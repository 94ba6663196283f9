"""Widely used training loops, for `benchmark.py step --peers`: `pip install -e '.[peers]'`.

With their own defaults except size, batch and precision:
examples/unconditional_image_generation/train_unconditional.py of github.com/huggingface/diffusers
and the Trainer of github.com/lucidrains/denoising-diffusion-pytorch.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dgm.common.errors import UserError

DIFFUSERS, DIFFUSERS_COMPILED, LUCIDRAINS = "diffusers", "diffusers-compiled", "lucidrains"
PEERS = DIFFUSERS, DIFFUSERS_COMPILED, LUCIDRAINS
MIN_BATCH = 16  # of lucidrains' Trainer


class Diffusers:
    """The recipe of diffusers' train_unconditional.py, on files of an image folder.

    With its defaults; or `compiled`, in channels_last and with data loader workers, as a user would
    tune it for speed.
    """

    def __init__(self, config: dict[str, Any], compiled: bool = False):
        import diffusers
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel
        from torchvision import datasets, transforms

        width = config["channels"]
        self.accelerator = Accelerator(
            mixed_precision=config["precision"], log_with="tensorboard",
            project_dir=config["folder"], dynamo_backend="inductor" if compiled else None,
        )  # fmt: skip
        self.layout = torch.channels_last if compiled else torch.contiguous_format
        net = diffusers_net(width).to(memory_format=self.layout)
        self.ema = EMAModel(
            net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75,
            model_cls=diffusers.UNet2DModel, model_config=net.config,
        )  # fmt: skip
        self.noise_scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        transform = transforms.Compose(
            [
                transforms.Resize(32, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(32),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        loader = torch.utils.data.DataLoader(
            datasets.ImageFolder(config["pictures"], transform), batch_size=config["batch"],
            shuffle=True, drop_last=True, **(_workers() if compiled else {}),
        )  # fmt: skip
        lr = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
        self.net, self.optimizer, self.loader, self.lr = self.accelerator.prepare(
            net, optimizer, loader, lr
        )
        self.ema.to(self.accelerator.device)
        self.accelerator.init_trackers("run")
        self.batches = itertools.chain.from_iterable(self.loader for _ in itertools.count())
        self.step = 0

    def train(self, steps: int) -> None:
        """Train `steps` steps."""
        for _ in range(steps):
            clean, _ = next(self.batches)
            clean = clean.to(memory_format=self.layout)
            noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
            t = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
            noised = self.noise_scheduler.add_noise(clean, noise, t)
            with self.accelerator.accumulate(self.net):
                loss = functional.mse_loss(self.net(noised, t).sample.float(), noise.float())
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
                self.optimizer.step()
                self.lr.step()
                self.optimizer.zero_grad()
            self.ema.step(self.net.parameters())
            self.step += 1
            logs = {"loss": loss.detach().item(), "lr": self.lr.get_last_lr()[0]}
            self.accelerator.log(logs, step=self.step)


class Lucidrains:
    """The Trainer of denoising-diffusion-pytorch, on files of an image folder."""

    def __init__(self, config: dict[str, Any]):
        import denoising_diffusion_pytorch as package

        # Its blocks are smaller: 70 channels make the 9 million parameters of DDPM's 64. An odd
        # number fails in its time embedding.
        width = 2 * round(config["channels"] * 35 / 64)
        self.net: nn.Module = package.Unet(dim=width, dim_mults=(1, 2, 2, 2))
        diffusion = package.GaussianDiffusion(self.net, image_size=32, timesteps=1000)
        self.trainer: Any = package.Trainer(
            diffusion, config["pictures"], train_batch_size=config["batch"], train_num_steps=0,
            gradient_accumulate_every=1, amp=config["precision"] != "no",
            mixed_precision_type="bf16", calculate_fid=False, save_and_sample_every=10**9,
            results_folder=str(Path(config["folder"]) / "results"), num_samples=25,
        )  # fmt: skip

    def train(self, steps: int) -> None:
        """Train `steps` steps."""
        self.trainer.train_num_steps += steps
        self.trainer.train()


def diffusers_net(width: int) -> Any:
    """Return diffusers' U-Net of DDPM's shape."""
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=2 * width,  # one head, as DDPM
    )


def _workers() -> dict[str, Any]:
    workers = min(8, (os.cpu_count() or 2) - 1)
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": True}


def check_batch(batch: int) -> None:
    """Raise UserError if a peer does not support such a small batch."""
    if batch < MIN_BATCH:
        raise UserError(f"--batch is {batch}: choose {MIN_BATCH} or more for --peers")


def check_installed() -> None:
    """Raise UserError if a package of the optional extra is missing."""
    for module in ("diffusers", "denoising_diffusion_pytorch"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install -e '.[peers]' for --peers")
