"""What there is to see of a VAE: reconstructions, ways between images, single latents.

Sheets are [rows, columns, C, H, W] in [-1, 1]: the decoder's means, of the encoder's means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgm.vae.networks import VAE
from dgm.vae.posterior import Posterior

MAX_ROWS = 8
COLUMNS = 10
PAIRS_PER_ROW = 5
REACH = 3.0  # standard deviations of the prior, either way


def reconstructions(net: VAE, x: Tensor, mu: Tensor) -> Tensor:
    """Lay out images beside what is left of them: original, reconstruction, original, ..."""
    pairs = min(PAIRS_PER_ROW, len(x))
    rows = min(MAX_ROWS, len(x) // pairs)
    count = rows * pairs
    both = torch.stack([x[:count], decode(net, mu[:count])], dim=1)
    return both.reshape(rows, 2 * pairs, *x.shape[1:])


def interpolation(net: VAE, mu: Tensor) -> Tensor:
    """Go from one image's encoding to the next one's, a row for each pair, in ten columns.

    Straight on: that is defined for any two encodings and any latent size. Going along a sphere
    suits two draws from the prior, which lie at one distance from 0; encodings do not.
    """
    rows = min(MAX_ROWS, len(mu) // 2)
    start, end = mu[0 : 2 * rows : 2], mu[1 : 2 * rows : 2]
    share = torch.linspace(0, 1, COLUMNS, dtype=mu.dtype, device=mu.device)[:, None]
    return _sheet(net, torch.lerp(start[:, None], end[:, None], share))


def traversal(net: VAE, posterior: Posterior) -> Tensor:
    """Move one dimension of the first image's encoding at a time from -3 to 3.

    Rows: the dimensions with the largest mean KL over the batch, largest first.
    """
    mu = posterior.mu
    dims = posterior.kl().mean(0).topk(min(MAX_ROWS, mu.shape[1])).indices
    reach = torch.linspace(-REACH, REACH, COLUMNS, dtype=mu.dtype, device=mu.device)
    z = mu[0].repeat(len(dims), COLUMNS, 1)
    z[torch.arange(len(dims)), :, dims] = reach
    return _sheet(net, z)


def decode(net: VAE, z: Tensor) -> Tensor:
    """Give the decoder's means, held within [-1, 1]."""
    return net.decoder(z).mean.clamp(-1, 1)


def _sheet(net: VAE, z: Tensor) -> Tensor:
    # Row by row, so that no more images than columns are in memory at a time.
    return torch.stack([decode(net, row) for row in z])
