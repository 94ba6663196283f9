"""Images in memory as a data set."""

from __future__ import annotations

import numpy as np


class ArrayImages:
    """Stored images uint8 [N, H, W, C], with labels int64 [N], all 0 where none are given."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None):
        self.pixels = pixels
        self._labels = np.zeros(len(pixels), np.int64) if labels is None else labels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: np.ndarray) -> np.ndarray:
        return self.pixels[index]

    def labels(self, index: np.ndarray) -> np.ndarray:
        return self._labels[index]
