"""Copy images from memory to the device without making the host wait for it."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dgm.rng import seed_key

_CHUNK = 8192  # images per copy while all are made resident
_MAX_MEMORY_FRACTION = 0.25  # resident images take at most this much of a GPU's free memory


class Images(Protocol):
    """A data set read by global index."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def images(self, index: np.ndarray) -> np.ndarray:
        """Return pixels, uint8 [B, H, W, C]."""
        ...

    def labels(self, index: np.ndarray) -> np.ndarray:
        """Return classes, int64 [B]."""
        ...


class DeviceLoader:
    """Loads images to a device.

    On a CPU they are gathered from the shards' memory. On a GPU all images are resident if they
    fit, and the host sends only indices; otherwise images are copied from pinned memory on a side
    stream, which overlaps with earlier steps.
    """

    def __init__(self, data: Images, device: torch.device, resident: bool | None = None):
        """`resident` keeps all images on the device; None does so on a GPU with enough memory."""
        self.data, self.device = data, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.key = functools.cache(lambda seed: seed_key(seed).to(device))
        """Return the key of a seed's draws, on the device."""
        self.resident: tuple[Tensor, Tensor] | None = None
        if _fits(data, device) if resident is None else resident:
            self.resident = _load_all(data, device)

    def load(self, index: Tensor, epochs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images, labels, index and epochs on the device; index and epochs are int64 [B]."""
        if self.resident is not None:
            index, epochs = self._send(torch.stack([index, epochs]))[0]
            return *self.gather(index), index, epochs
        images, labels = self.read(index)
        images, numbers = self._send(images, torch.stack([labels, index, epochs]))
        return images, *numbers

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return resident images and labels."""
        assert self.resident is not None, "the caller checks it"
        images, labels = (part.index_select(0, index) for part in self.resident)
        return images, labels

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Read images and labels from the shards, on the host."""
        rows = index.numpy()
        return torch.from_numpy(self.data.images(rows)), torch.from_numpy(self.data.labels(rows))

    def overwrite(self, target: Tensor, values: Tensor) -> None:
        """Copy the host's values into a tensor of the device, after its current work."""
        # The allocator reuses a pinned block only after its copy is done.
        pinned = values if self.stream is None else values.pin_memory()
        target.copy_(pinned, non_blocking=True)

    def _send(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.stream is None:
            return tuple(tensor.to(self.device) for tensor in tensors)
        with torch.cuda.stream(self.stream):
            # As in `overwrite`, a pinned block is reused only after its copy is done.
            sent = tuple(t.pin_memory().to(self.device, non_blocking=True) for t in tensors)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.stream)
        for tensor in sent:
            tensor.record_stream(now)
        return sent


def _fits(data: Images, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    size = len(data) * data.images(np.arange(1)).nbytes
    return size <= _MAX_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]


def _load_all(data: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy all images and labels to the device."""
    one = data.images(np.arange(1))
    images = torch.empty((len(data), *one.shape[1:]), dtype=torch.uint8, device=device)
    labels = torch.empty(len(data), dtype=torch.int64, device=device)
    for start in range(0, len(data), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(data)))
        images[start : start + len(rows)] = torch.from_numpy(data.images(rows)).to(device)
        labels[start : start + len(rows)] = torch.from_numpy(data.labels(rows)).to(device)
    return images, labels
