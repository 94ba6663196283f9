"""Weights and moments as named whole tensors: read from nets, put back, copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dgm.common.errors import UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
State = Mapping[Tensor, Mapping[str, Tensor]]
"""An optimizer's moments of each parameter by name."""


def load_nets(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy named tensors into nets; raises UserError naming the first that do not fit."""
    check_weights(nets, tensors)
    with torch.no_grad():
        for key, value in _named(nets).items():
            value.copy_(tensors[key])


def check_weights(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first tensors that do not fit the nets."""
    _check({key: value.shape for key, value in _named(nets).items()}, tensors)


def check_moments(nets: Mapping[str, nn.Module], moments: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first moments that do not fit; a parameter has all or none."""
    wanted = {
        f"{name}.{kind}.{key}": torch.Size() if kind == "step" else parameter.shape
        for name, net in nets.items()
        for key, parameter in net.named_parameters()
        for kind in MOMENTS
        if any(f"{name}.{other}.{key}" in moments for other in MOMENTS)
    }
    _check(wanted, moments)


def _named(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{n}.{key}": value for n, net in nets.items() for key, value in net.state_dict().items()
    }


def _check(wanted: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    unfit = sorted(wanted.keys() ^ tensors.keys())
    unfit += [
        key for key, shape in wanted.items() if key in tensors and tensors[key].shape != shape
    ]
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


def moments_of(net: nn.Module, state: State) -> dict[str, Tensor]:
    """Name an optimizer's moments by `moment.parameter`; those that it has."""
    return {
        f"{kind}.{key}": value
        for key, parameter in net.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def load_moments(
    net: nn.Module,
    put: Callable[[nn.Parameter, dict[str, Tensor]], None],
    moments: Mapping[str, Tensor],
) -> None:
    """Put an optimizer's named moments back, those of a parameter by `put`."""
    for key, parameter in net.named_parameters():
        names = {kind: f"{kind}.{key}" for kind in MOMENTS}
        found = {kind: moments[name] for kind, name in names.items() if name in moments}
        if found:
            put(parameter, _like_parameter(found, parameter))


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
