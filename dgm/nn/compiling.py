"""torch.compile with a fallback to eager mode."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dgm.common.errors import cache_variable
from dgm.nn.kernels.dispatch import under_transform


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function; if that fails, warn once and run it uncompiled."""
    _compile_backward_eagerly()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    return _or_eager(fast, function, function.__name__)


def compile_net(net: nn.Module, graphs: bool = False) -> None:
    """Compile a network in place; if that fails, warn once and run it uncompiled.

    With `graphs`, CUDA graphs are captured: the host launches whole graphs instead of kernels.
    """
    _guard_requires_grad()
    _compile_backward_eagerly()
    net.compile(mode="reduce-overhead" if graphs else None)
    # In place, since a wrapper would rename the keys of the state dict.
    net._compiled_call_impl = _or_eager(
        net._compiled_call_impl,  # type: ignore[arg-type]
        net._call_impl,
        type(net).__name__,
    )


def _guard_requires_grad() -> None:
    """Make compiled networks guard on `requires_grad`, which a GAN's phases toggle.

    Dynamo skips the guards on parameters whose module dictionaries have not changed, and
    `requires_grad_` changes none (pytorch #139476): on torch 2.11 the generator's first step runs
    the discriminator that was compiled for inputs without a gradient, so its loss has none. Torch
    2.15 does not need this; the versions between were not tried.
    """
    if torch.__version__ < "2.15":
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False


def _compile_backward_eagerly() -> None:
    """Compile the backward pass together with the forward pass, at the first call.

    By default it is compiled on its first use, inside `backward()`, where a failure can no longer
    fall back to eager mode.
    """
    import torch._functorch.config

    torch._functorch.config.force_non_lazy_backward_lowering = True


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled networks run in eager mode."""
    # Importing the compiler takes seconds; without it nothing was compiled.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _cache_fault(error: BaseException) -> str | None:
    """Return the message for an unwritable compiler cache; None for other errors."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    if cause is None or not isinstance(cause.filename, str):
        return None
    variable = cache_variable(cause.filename)
    if variable is None:  # for instance a missing compiler
        return None
    return (
        f"the compiler's cache {cause.filename} cannot be written ({cause.strerror}): make it "
        f"writable, or set {variable} to another folder"
    )


def _or_eager(fast: Callable[..., Any], plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    # No compiler or headers; or more batch sizes than torch's recompile limit.
    failures = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
    working = True

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal working
        if working and not under_transform():  # compiled code may drop tangents
            try:
                return fast(*args, **kwargs)
            except (*failures, OSError) as error:
                fault = _cache_fault(error)
                if fault is None and isinstance(error, OSError):
                    raise
                working = False
                reason = fault or str(error).strip().splitlines()[0]
                # Attributed to this file: the caller is torch, whose warnings are hidden.
                warnings.warn(f"{name} runs uncompiled: {reason}", stacklevel=1)
        return plain(*args, **kwargs)

    return call
