"""Input and output skips at every image size of a U-Net, for what must agree over the whole image.

At high noise only means over large areas tell anything. A small net takes long to learn such means
through strided convolutions; shrunken copies of its input hand them over.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from dgm.nn.layers import group_norm, zeroed


class Pyramid(nn.Module):
    """Feed shrunken images to the smaller levels; add to the output what they say of it.

    The "progressive" input and output of NCSN++ (Song et al. 2021, appendix H), which took them
    from StyleGAN2 (Karras et al. 2020).
    """

    def __init__(
        self,
        fed: list[int],
        saying: list[int],
        first_factor: int,
        image_channels: int,
        outputs: int,
    ):
        """Prepare for smaller levels, of widths `fed` as they begin and `saying` as they end.

        The first is smaller than the image by `first_factor`, each further one by two more.
        """
        super().__init__()
        self.factors = [first_factor << i for i in range(len(fed))]
        self.feeds = nn.ModuleList(nn.Conv2d(image_channels, w, 3, padding=1) for w in fed)
        self.says = nn.ModuleList(
            nn.Sequential(group_norm(w), nn.SiLU(), zeroed(nn.Conv2d(w, outputs, 3, padding=1)))
            for w in saying
        )

    def feed(self, level: int, x: Tensor) -> Tensor:
        """Turn the image x [B, C, H, W] into features of a level."""
        factor = self.factors[level]
        # A mean over factor^2 pixels leaves 1/factor of white noise but all of a large shape;
        # scaling half of that back keeps both in a range that the next layers can use.
        return cast(Tensor, self.feeds[level](functional.avg_pool2d(x, factor) * (factor / 2)))

    def say(self, level: int, h: Tensor) -> Tensor:
        """Turn features of a level into its part of the output, at the image's size."""
        factor = self.factors[level]
        return functional.interpolate(self.says[level](h), scale_factor=factor, mode="bilinear")
