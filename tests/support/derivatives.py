"""Derivatives of a function of tensors, in the ways in which an operator can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def three_orders(function: Function, inputs: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Return the gradients of orders one to three, each of a function of the lower orders."""
    leaves = [part.requires_grad_() for part in inputs]
    value = (function(*leaves).sin() * weights).sum()
    found: list[Tensor] = []
    for _ in range(3):
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        found += [gradient.detach() for gradient in gradients]
        value = torch.stack([gradient.square().mean() for gradient in gradients]).sum()
    return found


def gradient_penalty(
    function: Function, inputs: Sequence[Tensor], frozen: Sequence[int] = ()
) -> list[Tensor]:
    """Return the gradient of a squared gradient, with respect to inputs that are not frozen."""
    leaves = [part.requires_grad_() for i, part in enumerate(inputs) if i not in frozen]
    first = torch.autograd.grad(function(*inputs).sin().sum(), leaves, create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
    return list(torch.autograd.grad(penalty, leaves))


def forward_mode(
    function: Function, inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return a value, its tangent, and the gradients of a loss of each (as in MeanFlow)."""
    leaves = tuple(part.requires_grad_() for part in inputs)
    primal, tangent = torch.func.jvp(lambda *g: function(*g).sin(), leaves, tuple(tangents))
    of_primal = torch.autograd.grad(primal.square().sum(), leaves, retain_graph=True)
    of_tangent = torch.autograd.grad(tangent.square().sum(), leaves)
    return [primal.detach(), tangent.detach(), *of_primal, *of_tangent]


def functional_gradient(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient by torch.func."""
    return list(_gradient_of(function, inputs)(*inputs))


def hessian_vector_product(
    function: Function, inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> list[Tensor]:
    """Return the Hessian times a vector, in forward over reverse mode."""
    return list(torch.func.jvp(_gradient_of(function, inputs), tuple(inputs), tuple(tangents))[1])


def _gradient_of(function: Function, inputs: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    argnums = tuple(range(len(inputs)))
    return torch.func.grad(lambda *g: function(*g).sin().sum(), argnums=argnums)


def assert_derivatives_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, floor: float = 0.01
) -> None:
    """Compare with float64 results, relative to the largest entry of each tensor.

    Where a derivative cancels to zero, as for a shift that GroupNorm removes, only rounding is
    left; it is compared with `floor` times the largest entry of all results.
    """
    largest = max(float(exact.abs().max()) for exact in expected)
    for number, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        error = (ours.double() - exact).abs().max()
        size = max(float(exact.abs().max()), floor * largest)
        assert error < tolerance * size, f"{number}: {error:.1e} of {size:.1e}"
