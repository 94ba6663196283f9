"""Weights and moments as named whole tensors: read from nets, put back, copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dgm.errors import UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def load_nets(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into nets; raises UserError naming the first that do not fit."""
    wanted = {f"{n}.{key}": value for n, m in nets.items() for key, value in m.state_dict().items()}
    unfit = sorted(wanted.keys() ^ tensors.keys())
    unfit += [
        key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape
    ]
    _refuse(unfit)
    with torch.no_grad():
        for key, value in wanted.items():
            value.copy_(tensors[key])


def check_moments(nets: Mapping[str, nn.Module], moments: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first moments that do not fit; a parameter has all or none."""
    wanted = {
        f"{name}.{kind}.{key}": torch.Size() if kind == "step" else parameter.shape
        for name, net in nets.items()
        for key, parameter in net.named_parameters()
        for kind in MOMENTS
        if any(f"{name}.{other}.{key}" in moments for other in MOMENTS)
    }
    unfit = sorted(wanted.keys() ^ moments.keys())
    _refuse(unfit + [k for k in wanted.keys() & moments.keys() if wanted[k] != moments[k].shape])


def _refuse(unfit: list[str]) -> None:
    if unfit:
        shown = ", ".join(unfit[:3]) + (f" and {len(unfit) - 3} more" if len(unfit) > 3 else "")
        raise UserError(
            f"the checkpoint does not fit the model at {shown}: use the model.* of its config.yaml"
        )


def in_channels_last(net: nn.Module) -> nn.Module:
    """Lay out a net's convolutions for [B, H, W, C] in memory; the numbers stay."""
    convolves = any(p.ndim == 4 for p in net.parameters())
    return net.to(memory_format=torch.channels_last) if convolves else net


def copies(nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copy nets, frozen, without what an engine added to them."""
    return {name: frozen_copy(net) for name, net in nets.items()}


def frozen_copy(net: nn.Module) -> nn.Module:
    """Copy a net, frozen."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def moments_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name an optimizer's moments by `moment.parameter`; those that it has."""
    return {
        f"{kind}.{key}": value
        for key, parameter in net.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    net: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    """Put an optimizer's named moments back."""
    for key, parameter in net.named_parameters():
        names = {kind: f"{kind}.{key}" for kind in MOMENTS}
        found = {kind: moments[name] for kind, name in names.items() if name in moments}
        if found:
            optimizer.state[parameter] = _like_parameter(found, parameter)


def _like_parameter(found: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Place moments beside their parameter, in its memory format."""
    with torch.no_grad():
        placed = {
            kind: torch.empty_like(parameter, requires_grad=False).copy_(value)
            for kind, value in found.items()
            if kind != "step"
        }
    # A fused optimizer counts steps on the parameter's device.
    return {"step": found["step"].to(parameter.device), **placed}
