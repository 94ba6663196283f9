"""A small classifier trained on real images: does it see the class that was asked for?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dgm.rng import permutation
from dgm.train.batches import Images


class Classifier(nn.Module):
    """Three stages of convolutions; [B, 3, H, W] in [-1, 1] to logits [B, classes]."""

    def __init__(self, num_classes: int, width: int = 32, channels: int = 3):
        """Make a net of about 0.3 M parameters at the default width."""
        super().__init__()
        stages: list[nn.Module] = []
        inputs = channels
        for outputs in (width, 2 * width, 4 * width):
            for _ in range(2):
                stages += [
                    nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                ]
                inputs = outputs
            stages.append(nn.MaxPool2d(2))
        self.stages = nn.Sequential(*stages)
        self.out = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits."""
        return self.out(self.stages(x).mean((2, 3)))


def train_classifier(
    data: Images, num_classes: int, epochs: int, seed: int, device: torch.device, batch: int = 100
) -> Classifier:
    """Train on all images of a data set; the same seed gives the same classifier on one machine."""
    torch.manual_seed(seed)
    net = Classifier(num_classes).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    per_epoch = -(-len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * per_epoch)
    for epoch in range(epochs):
        for index in permutation(seed, epoch, len(data)).split(batch):
            loss = functional.cross_entropy(
                net(to_input(data.images(index.numpy()), device)),
                torch.from_numpy(data.labels(index.numpy())).to(device),
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return net.eval()


@torch.no_grad()
def classify(net: Classifier, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """Give the class of each of uint8 [N, H, W, C], int64 [N]."""
    device = next(net.parameters()).device
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return np.concatenate([net(to_input(part, device)).argmax(1).cpu().numpy() for part in parts])


def to_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Turn uint8 [B, H, W, C] into floats [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
