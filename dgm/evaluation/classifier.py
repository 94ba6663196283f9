"""A small classifier of the real images, for class consistency and as a feature extractor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from dgm.common.atomic_io import replacing
from dgm.common.progress import advance, progress
from dgm.nn.layers import use_kernels
from dgm.preprocessing import STANDARD
from dgm.rng import permutation
from dgm.tensor_files import save_tensors
from dgm.training.device_loader import Images
from dgm.training.engine import Engine

BATCH = 500  # images that are classified at once
_TRAINING_BATCH = 100


class Classifier(nn.Module):
    """Three stages of convolutions; [B, 3, H, W] in [-1, 1] to logits [B, classes]."""

    def __init__(self, num_classes: int, width: int = 32):
        """Build a net of about 0.3 M parameters at the default width."""
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 3
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

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the last layer, [B, 4 width]."""
        return self.stages(x).mean((2, 3))

    def stage_features(self, x: Tensor) -> list[Tensor]:
        """Return the output of each of the three stages, [B, D, H, W]."""
        outputs = []
        for layer in self.stages:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.out(self.features(x))


def train_classifier(
    data: Images, num_classes: int, epochs: int, seed: int, device: torch.device
) -> Classifier:
    """Return a classifier of a data set's images, reproducible from the seed on one machine.

    The global random state does not change.
    """
    net = _initialized(num_classes, seed).to(device).to(memory_format=torch.channels_last)
    use_kernels(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    per_epoch = -(-len(data) // _TRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * per_epoch)
    for epoch in range(epochs):
        for index in permutation(seed, epoch, len(data)).split(_TRAINING_BATCH):
            advance(len(index))
            loss = functional.cross_entropy(
                net(to_input(data.images(index.numpy()), device)),
                torch.from_numpy(data.labels(index.numpy())).to(device),
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return net.eval()


def _initialized(num_classes: int, seed: int) -> Classifier:
    """Return a net with weights drawn from a seed; the global random state does not change."""
    # The weights are drawn on the CPU: seed its generator alone, as torch.manual_seed would seed
    # every device's.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Classifier(num_classes)


def cached_classifier(
    engine: Engine,
    folder: Path,
    data: Images,
    data_id: str,
    num_classes: int,
    epochs: int,
    seed: int,
) -> Classifier:
    """Return the classifier of a data set, read from `folder` or trained by the first process.

    A damaged file is replaced. Collective: call on all ranks.
    """
    path = folder / f"classifier-{data_id}-{epochs}-epochs-seed{seed}.safetensors"

    def train() -> None:
        if _read(path, num_classes) is None:
            label = "training a classifier of the images, once for this data set"
            with progress(label, epochs * len(data), single_process=True):
                net = train_classifier(data, num_classes, epochs, seed, engine.device)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as partial:
                save_tensors(partial, {k: v.contiguous() for k, v in net.state_dict().items()})

    engine.on_main(train)
    net = _read(path, num_classes)
    assert net is not None, f"{path} was just written"
    use_kernels(net)
    return net.to(engine.device).to(memory_format=torch.channels_last)


def _read(path: Path, num_classes: int) -> Classifier | None:
    net = _initialized(num_classes, 0)  # the weights are replaced
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):  # missing or damaged
        return None
    return net.eval()


@torch.no_grad()
def classify(net: Classifier, images: np.ndarray) -> np.ndarray:
    """Return the likeliest class of each image, uint8 [N, H, W, C]: int64 [N]."""
    return torch.cat([net(x).argmax(1) for x in _batches(net, images)]).cpu().numpy()


@torch.no_grad()
def extract_features(net: Classifier, images: np.ndarray) -> Tensor:
    """Return the features of each image, uint8 [N, H, W, C]: [N, D] on the CPU."""
    return torch.cat([net.features(x) for x in _batches(net, images)]).cpu()


def _batches(net: Classifier, images: np.ndarray) -> Iterator[Tensor]:
    device = next(net.parameters()).device
    for start in range(0, len(images), BATCH):
        yield to_input(images[start : start + BATCH], device)


def to_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Convert uint8 [B, H, W, C] to floats [B, C, H, W] in [-1, 1]."""
    return STANDARD.scale(torch.from_numpy(images).to(device))
