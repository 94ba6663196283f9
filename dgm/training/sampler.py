"""The images of each step: from a position in the run to epoch, image index and pixels."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from dgm.common.errors import UserError
from dgm.objective import Batch
from dgm.rng import PERMUTATION_BLOCK, Draws, permutation_block
from dgm.training.device_loader import DeviceLoader, Images


class BatchSampler:
    """Divides the endless sequence of shuffled images into this process's micro-batches.

    Position p of the run lies in epoch p // N, where that epoch's permutation names the image. So
    the order depends on neither the number of processes nor the batch size, and a run's position
    in the data is one integer.
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
        resident: bool | None = False,
    ):
        """Raise UserError where processes or micro-batches cannot share the batch equally.

        `resident` keeps all images on the device; None does so on a GPU with enough free memory.
        """
        if global_batch < 1 or global_batch % world_size:
            raise UserError(
                f"train.global_batch {global_batch} cannot be divided among {world_size} "
                f"processes: choose a multiple of {world_size}"
            )
        self.global_batch, self.images_per_rank = global_batch, global_batch // world_size
        self.micro_batch = self.images_per_rank if micro_batch is None else micro_batch
        if self.micro_batch < 1 or self.images_per_rank % self.micro_batch:
            raise UserError(
                f"train.micro_batch {self.micro_batch} does not divide the {self.images_per_rank} "
                f"images that each of {world_size} processes takes of train.global_batch "
                f"{global_batch}: choose a divisor"
            )
        self.data, self.seed, self.first = data, seed, rank * self.images_per_rank
        self.length = min(global_batch, len(data)) if overfit_one_batch else len(data)
        self.loader = functools.cache(lambda device: DeviceLoader(data, device, resident))
        """Return the loader of a device."""
        # A batch may straddle two blocks of an epoch's order; older ones are not needed.
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch, block: permutation_block(seed, epoch, self.length, block)
        )

    @property
    def num_micro(self) -> int:
        """Return the number of micro-batches of a step on this process."""
        return self.images_per_rank // self.micro_batch

    def micro_batches(
        self, images_seen: int, device: torch.device
    ) -> Iterator[tuple[Batch, Draws]]:
        """Yield the micro-batches of the step that starts at `images_seen`."""
        for index, epochs in self.indices(images_seen):
            yield self._load(index, epochs, device, images_seen)

    def indices(self, images_seen: int) -> torch.Tensor:
        """Return index and epoch of a step's images, int64 [num_micro, 2, micro_batch] (CPU)."""
        both = self._images_at(images_seen + self.first, self.images_per_rank)
        return both.view(2, self.num_micro, self.micro_batch).transpose(0, 1)

    def first_images(self, count: int, device: torch.device) -> tuple[Batch, Draws]:
        """Return the first images of the run, the same on every process."""
        index, epochs = self._images_at(0, min(count, self.length))
        return self._load(index, epochs, device, 0)

    def _load(
        self, index: torch.Tensor, epochs: torch.Tensor, device: torch.device, images_seen: int
    ) -> tuple[Batch, Draws]:
        loader = self.loader(device)
        images, labels, index, epochs = loader.load(index, epochs)
        step = images_seen // self.global_batch
        return Batch(images, labels, images_seen, step), Draws(loader.key(self.seed), index, epochs)

    def _images_at(self, start: int, count: int) -> torch.Tensor:
        """Return index and epoch of the images at positions of the run, int64 [2, count]."""
        index, epochs, position = [], [], start
        while position < start + count:
            epoch, offset = divmod(position, self.length)
            block, first = divmod(offset, PERMUTATION_BLOCK)
            part = self._order(epoch, block)[first : first + start + count - position]
            index.append(part)
            epochs.append(torch.full_like(part, epoch))
            position += len(part)
        return torch.stack([torch.cat(index), torch.cat(epochs)])


def trial_batch(
    count: int, image_shape: tuple[int, ...], device: torch.device
) -> tuple[Batch, Draws]:
    """Return `count` black images of class 0, for a trial of the loss."""
    images = torch.zeros((count, *image_shape), dtype=torch.uint8, device=device)
    index = torch.arange(count, device=device)
    # One step per image, as in training, where a batch may span two epochs.
    return Batch(images, torch.zeros_like(index)), Draws.of(0, index, index)
