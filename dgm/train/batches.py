"""Which images a process sees when: position in the run -> epoch and image index -> pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from dgm.errors import UserError
from dgm.objective import Batch
from dgm.rng import Draws, permutation


class Images(Protocol):
    """A data set read by global index."""

    def __len__(self) -> int:
        """Count the images."""
        ...

    def images(self, index: np.ndarray) -> np.ndarray:
        """Give pixels, uint8 [B, H, W, C]."""
        ...

    def labels(self, index: np.ndarray) -> np.ndarray:
        """Give classes, int64 [B]."""
        ...


class Batches:
    """Cut the endless order of images into this process's micro-batches.

    Position p of the run lies in epoch p // N, where a permutation of that epoch names the image.
    So the order depends on neither the number of processes nor the batch, and a run's place in
    the data is one integer.
    """

    def __init__(
        self,
        data: Images,
        seed: int,
        global_batch: int,
        micro_batch: int | None,
        rank: int,
        world_size: int,
        overfit_one_batch: bool = False,
    ):
        """Prepare; raises UserError where the batch does not divide."""
        if global_batch < 1 or global_batch % world_size:
            raise UserError(
                f"train.global_batch {global_batch} does not divide among {world_size} processes: "
                f"choose a multiple of {world_size}"
            )
        self.global_batch, self.share = global_batch, global_batch // world_size
        self.micro_batch = self.share if micro_batch is None else micro_batch
        if self.micro_batch < 1 or self.share % self.micro_batch:
            raise UserError(
                f"train.micro_batch {self.micro_batch} does not divide the {self.share} images "
                f"that each of {world_size} processes takes of train.global_batch {global_batch}: "
                "choose a divisor"
            )
        self.data, self.seed, self.first = data, seed, rank * self.share
        self.length = min(global_batch, len(data)) if overfit_one_batch else len(data)
        self._orders: dict[int, torch.Tensor] = {}

    @property
    def num_micro(self) -> int:
        """Count the micro-batches of a step on this process."""
        return self.share // self.micro_batch

    def step(self, images_seen: int, device: torch.device) -> Iterator[tuple[Batch, Draws]]:
        """Go through the micro-batches of the step that starts at `images_seen`."""
        for k in range(self.num_micro):
            start = images_seen + self.first + k * self.micro_batch
            positions = torch.arange(start, start + self.micro_batch)
            epochs = positions // self.length
            index = torch.empty_like(positions)
            for epoch in epochs.unique().tolist():
                here = epochs == epoch
                index[here] = self._order(epoch)[positions[here] % self.length]
            yield (
                self._load(index, device, images_seen),
                Draws.of(self.seed, index.to(device), epochs.to(device)),
            )

    def first_images(self, count: int, device: torch.device) -> tuple[Batch, Draws]:
        """Give the images that the run begins with, the same on every process."""
        index = self._order(0)[:count]
        return self._load(index, device, 0), Draws.of(self.seed, index.to(device))

    def _load(self, index: torch.Tensor, device: torch.device, images_seen: int) -> Batch:
        rows = index.numpy()
        images = torch.from_numpy(self.data.images(rows))
        labels = torch.from_numpy(self.data.labels(rows))
        if device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return Batch(images, labels, images_seen)

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            # A batch may straddle epochs, so the one before is kept; older ones are not needed.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = permutation(self.seed, epoch, self.length)
        return self._orders[epoch]
