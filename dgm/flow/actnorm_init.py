"""Layer-by-layer passes through a flow: actnorm initialization, and locating non-finite values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
        assert isinstance(layer, ActNorm | NormedConv), "only these are hooked"
        layer.initialize(inputs[0])

    layers = [m for m in flow.modules() if isinstance(m, ActNorm | NormedConv)]
    hooks = [layer.register_forward_pre_hook(set_weights) for layer in layers]
    try:
        with uncompiled():
            flow(x)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def find_non_finite(flow: nn.Module, x: Tensor) -> str | None:
    """Return path and class of the first layer whose output for images x is not finite.

    The networks inside couplings are searched too.
    """
    found: list[str] = []

    def make_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(layer: nn.Module, _: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                found.append(f"{name} ({type(layer).__name__})")

        return check

    hooks = [m.register_forward_hook(make_hook(name)) for name, m in flow.named_modules() if name]
    try:
        with uncompiled():
            z, _ = flow(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not bool(torch.isfinite(normal_log_prob(z)).all()):
        found.append(f"the density of z, whose largest magnitude is {float(z.abs().max()):.3g}")
    return found[0] if found else None
