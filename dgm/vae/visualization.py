"""Image grids of a VAE: reconstructions, interpolations, latent traversals.

Grids are [rows, columns, C, H, W] in [-1, 1], the decoder's means at the encoder's means.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgm.latent_space import lerp_path
from dgm.vae.posterior import Posterior

Decode = Callable[[Tensor], Tensor]
MAX_ROWS = 8
COLUMNS = 10
PAIRS_PER_ROW = 5
REACH = 3.0  # standard deviations of the prior


def reconstructions(decode: Decode, x: Tensor, mu: Tensor) -> Tensor:
    """Return images beside their reconstructions: original, reconstruction, original, ..."""
    pairs = min(PAIRS_PER_ROW, len(x))
    rows = min(MAX_ROWS, len(x) // pairs)
    count = rows * pairs
    both = torch.stack([x[:count], decode(mu[:count])], dim=1)
    return both.reshape(rows, 2 * pairs, *x.shape[1:])


def interpolation(decode: Decode, mu: Tensor) -> Tensor:
    """Return linear interpolations between encodings, a row of ten images for each pair.

    Spherical ones would suit draws from the prior, but encodings have different norms.
    """
    rows = min(MAX_ROWS, len(mu) // 2)
    start, end = mu[0 : 2 * rows : 2], mu[1 : 2 * rows : 2]
    return _decode_rows(decode, lerp_path(start, end, COLUMNS))


def traversal(decode: Decode, posterior: Posterior) -> Tensor:
    """Return images of the first image's encoding with one dimension at a time varied from -3 to 3.

    Rows: the dimensions with the largest mean KL over the batch, largest first.
    """
    mu = posterior.mu
    dims = posterior.kl().mean(0).topk(min(MAX_ROWS, mu.shape[1])).indices
    reach = torch.linspace(-REACH, REACH, COLUMNS, dtype=mu.dtype, device=mu.device)
    z = mu[0].repeat(len(dims), COLUMNS, 1)
    z[torch.arange(len(dims)), :, dims] = reach
    return _decode_rows(decode, z)


def _decode_rows(decode: Decode, z: Tensor) -> Tensor:
    # Row by row, to limit memory.
    return torch.stack([decode(row) for row in z])
