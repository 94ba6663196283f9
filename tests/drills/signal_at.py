"""Run a script that sends itself a signal, or fails, at a chosen moment.

    python signal_at.py KIND:N[=OPTION][@RANK] launch/train_ddpm.py ...

N counts from the start of the process; RANK selects one process.

forward:N[=SIGNAL]  after the N-th forward pass of the training, before its gradient; SIGKILL, or
                    another signal such as STOP
term:N              SIGTERM at the same moment
fault:N[=TERM]      a RuntimeError there instead; with TERM followed by a SIGTERM once the error
                    leaves the script, as a launcher sends
mistake:N           a UserError there
nan:N               the loss is NaN there
clock:N[=SECONDS]   the clock is moved there, by default by -3600 s (see moved_clock.cpp)
update:N            after the N-th update of the weights, before that of the moving average
file:N[=SIGNAL]     when the N-th file of a checkpoint is on the disk
saved:N             after the N-th checkpoint
"""

from __future__ import annotations

import ctypes
import itertools
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dgm.common.errors import UserError
from dgm.training import checkpoint
from dgm.training.ddp import DataParallelNet
from dgm.training.zero import DeepSpeedPartitioned, DeepSpeedReplicated

WRAPPED = DataParallelNet, DeepSpeedReplicated, DeepSpeedPartitioned
ERRORS = {"fault": RuntimeError, "mistake": UserError}
FUNCTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "update": (WRAPPED, "clip_and_step"),
    "file": ((checkpoint,), "_write_file"),  # called for every file of a checkpoint
    "saved": ((checkpoint,), "write"),
}


def after(
    function: Callable[..., Any], calls: int, action: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Wrap a function so that the result of the `calls`-th call passes through `action`."""
    number = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return action(result) if next(number) == calls else result

    return call


def act(kind: str, option: str, result: Any) -> Any:
    """Send the signal, raise the error or move the clock; return `result`, NaN for `nan`."""
    if kind == "nan":
        return result * float("nan")
    if kind in ERRORS:
        raise ERRORS[kind](f"a {kind} of this process alone")
    if kind == "clock":
        ctypes.CDLL(None).move_clock(ctypes.c_long(int(option or -3600)))
    else:
        default = "TERM" if kind == "term" else "KILL"
        os.kill(os.getpid(), signal.Signals[f"SIG{option or default}"])
    return result


def arrange(kind: str, calls: int, option: str) -> None:
    """Patch the function after whose N-th call the action happens."""

    def action(result: Any) -> Any:
        return act(kind, option, result)

    owners, name = FUNCTIONS.get(kind, ((), ""))
    for owner in owners:
        setattr(owner, name, after(getattr(owner, name), calls, action))
    if owners:
        return
    forward = after(lambda loss: loss(), calls, action)

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, loss, sync: original(self, lambda: forward(loss), sync)

    for wrapped in WRAPPED:  # the wrappers that engines put around a forward pass
        wrapped.forward = patched(wrapped.forward)


def main() -> None:
    """Patch the function of the moment, then run the script."""
    moment, _, rank = sys.argv[1].partition("@")
    moment, _, option = moment.partition("=")
    kind, calls = moment.split(":")
    if rank in ("", os.environ.get("RANK", "0")):
        arrange(kind, int(calls), option)
    sys.argv = sys.argv[2:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except RuntimeError:
        if (kind, option) == ("fault", "TERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        raise


if __name__ == "__main__":
    main()
