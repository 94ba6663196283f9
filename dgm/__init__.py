"""Train deep generative models: diffusion models, GANs, VAEs and normalizing flows.

`dgm.load(folder)` opens a trained run, `dgm.train(family, ...)` trains one. Nothing here imports
torch before one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgm.api import Run, load, train

__all__ = ["Run", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dgm' has no attribute '{name}'")
    from dgm import api

    return getattr(api, name)
