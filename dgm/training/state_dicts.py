"""Weights and moments as named unsharded tensors: read from nets, loaded, copied."""

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
    """Copy named tensors into nets; raise UserError naming the first that do not fit."""
    check_weights(nets, tensors)
    with torch.no_grad():
        for key, value in tensors_of(nets).items():
            value.copy_(tensors[key])


def check_weights(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first tensors that do not fit the nets."""
    _check({key: value.shape for key, value in tensors_of(nets).items()}, tensors)


def check_moments(nets: Mapping[str, nn.Module], moments: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first moments that do not fit; a parameter has all or none."""
    expected = {
        f"{name}.{kind}.{key}": torch.Size() if kind == "step" else parameter.shape
        for name, net in nets.items()
        for key, parameter in net.named_parameters()
        for kind in MOMENTS
        if any(f"{name}.{other}.{key}" in moments for other in MOMENTS)
    }
    _check(expected, moments)


def tensors_of(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return weights and buffers by `net.parameter`."""
    return {
        f"{n}.{key}": value for n, net in nets.items() for key, value in net.state_dict().items()
    }


def _check(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    misfits = sorted(expected.keys() ^ tensors.keys())
    misfits += [
        key for key, shape in expected.items() if key in tensors and tensors[key].shape != shape
    ]
    if misfits:
        names = ", ".join(misfits[:3]) + (
            f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        )
        raise UserError(
            f"the checkpoint does not fit the model at {names}: use the model.* of its config.yaml"
        )


def in_channels_last(net: nn.Module) -> nn.Module:
    """Convert a net with convolutions to channels_last memory format."""
    has_convolutions = any(p.ndim == 4 for p in net.parameters())
    return net.to(memory_format=torch.channels_last) if has_convolutions else net


def frozen_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a net in evaluation mode, without gradients."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def moments_of(net: nn.Module, state: State) -> dict[str, Tensor]:
    """Return moments by `<moment>.<parameter>`; parameters without any are left out."""
    return {
        f"{kind}.{key}": value
        for key, parameter in net.named_parameters()
        for kind, value in state.get(parameter, {}).items()
    }


def load_moments(
    net: nn.Module,
    load: Callable[[nn.Parameter, dict[str, Tensor]], None],
    moments: Mapping[str, Tensor],
) -> None:
    """Load an optimizer's named moments; `load` sets those of a parameter."""
    for key, parameter in net.named_parameters():
        names = {kind: f"{kind}.{key}" for kind in MOMENTS}
        found = {kind: moments[name] for kind, name in names.items() if name in moments}
        if found:
            load(parameter, _like_parameter(found, parameter))


def _like_parameter(found: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """Move moments to their parameter's device and memory format."""
    with torch.no_grad():
        moved = {
            kind: torch.empty_like(parameter, requires_grad=False).copy_(value)
            for kind, value in found.items()
            if kind != "step"
        }
    # A fused optimizer counts steps on the parameter's device.
    return {"step": found["step"].to(parameter.device), **moved}
