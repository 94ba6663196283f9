"""Layer-by-layer passes through a flow: actnorm initialization, and locating non-finite values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from dgm.flow.bijections import ActNorm
from dgm.flow.coupling import NormedConv
from dgm.flow.networks import normal_log_prob
from dgm.nn.compiling import uncompiled


@torch.no_grad()
def initialize(flow: nn.Module, x: Tensor) -> None:
    """Set every actnorm so that its output for images x has mean 0 and variance 1 per channel.

    Each sees the outputs of the layers initialized before it (Kingma and Dhariwal 2018, 3.1).
    """

    def set_weights(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(layer, ActNorm | NormedConv):
            layer.initialize(inputs[0])

    with uncompiled(), register_module_forward_pre_hook(set_weights):
        flow(x)


@torch.no_grad()
def find_non_finite(flow: nn.Module, x: Tensor) -> str | None:
    """Return path and class of the first layer whose output for images x is not finite.

    The networks inside couplings are searched too. If all outputs are finite, return a description
    of z if its density is not, else None.
    """
    names = {layer: name for name, layer in flow.named_modules() if name}
    found: list[str] = []

    def check(layer: nn.Module, _: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if layer in names and not all(bool(torch.isfinite(part).all()) for part in parts):
            found.append(f"{names[layer]} ({type(layer).__name__})")

    with uncompiled(), register_module_forward_hook(check):
        z, _ = flow(x)
    if not found and not bool(torch.isfinite(normal_log_prob(z)).all()):
        found.append(f"the density of z, whose largest magnitude is {float(z.abs().max()):.3g}")
    return found[0] if found else None
