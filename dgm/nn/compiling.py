"""torch.compile where it can, the same code as it is where it cannot."""

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
from dgm.nn.kernels.choice import under_transform


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function; where compiling fails, warn once and run it as it is."""
    _compile_backward_at_once()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    return _or_eager(fast, function, function.__name__)


def compile_net(net: nn.Module, graphs: bool = False) -> None:
    """Compile a net in place; where compiling fails, warn once and run it as it is.

    `graphs` records what a GPU is to do as CUDA graphs, which cost the host one launch each.
    """
    _guard_requires_grad()
    _compile_backward_at_once()
    net.compile(mode="reduce-overhead" if graphs else None)
    # In place, as a wrapper would rename every key of the state; torch calls this one instead.
    net._compiled_call_impl = _or_eager(
        net._compiled_call_impl,  # type: ignore[arg-type]
        net._call_impl,
        type(net).__name__,
    )


def _guard_requires_grad() -> None:
    """Let compiled nets notice that parameters were frozen, as a GAN's are in turn.

    Dynamo skips the guards on parameters whose module dictionaries have not changed, and
    `requires_grad_` changes none (pytorch #139476): on torch 2.11 the generator's first step runs
    the discriminator that was compiled for frozen inputs, and its loss has no gradient. Torch 2.15
    does not need this; the versions between were not tried.
    """
    if torch.__version__ < "2.15":
        torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False


def _compile_backward_at_once() -> None:
    """Compile the backward pass together with the forward pass, at the first call.

    By default it is compiled on its first use, inside `backward()`, where it is too late to fall
    back to eager mode: a failure would end the run.
    """
    import torch._functorch.config

    torch._functorch.config.force_non_lazy_backward_lowering = True


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run the nets that were compiled as they are."""
    # None was where the compiler is not imported, which would take seconds.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _cache_fault(error: BaseException) -> str | None:
    """Return that the compiler's cache cannot be written, and what to do; None for other errors."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = getattr(seen, "inner_exception", None) or seen.__cause__ or seen.__context__
    if seen is None or not isinstance(seen.filename, str):
        return None
    variable = cache_variable(seen.filename)
    if variable is None:  # for instance of a compiler that is not there
        return None
    return (
        f"the compiler's cache {seen.filename} cannot be written ({seen.strerror}): make it "
        f"writable, or name another folder by {variable}"
    )


def _or_eager(fast: Callable[..., Any], plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    # No compiler, no headers; or more batch sizes than torch compiles for, an exception of its own.
    failures = torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit
    working = True

    @functools.wraps(plain)
    def call(*args: Any, **named: Any) -> Any:
        nonlocal working
        if working and not under_transform():  # compiled code may drop tangents
            try:
                return fast(*args, **named)
            except (*failures, OSError) as error:
                fault = _cache_fault(error)
                if fault is None and isinstance(error, OSError):
                    raise
                working = False
                reason = fault or str(error).strip().splitlines()[0]
                # As of this file: a net is called from within torch, whose warnings are not shown.
                warnings.warn(f"{name} runs uncompiled: {reason}", stacklevel=1)
        return plain(*args, **named)

    return call
