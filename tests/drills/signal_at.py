"""Run a script that sends itself a signal at a chosen moment: SIGKILL, or SIGTERM for `term`.

    python signal_at.py MOMENT launch/train_ddpm.py ...

Moments, N counted from the start of the process: `forward:N` after the N-th forward pass of the
training, before its gradient; `term:N` the same; `fault:N` raises an error there instead, with
`=TERM` followed by a SIGTERM once the error leaves the script, as a launcher sends; `mistake:N`
raises a UserError, `nan:N` makes the loss NaN, and `clock:N` moves the clock (see
moved_clock.cpp) by -3600 s, `clock:N=SECONDS` by others; `update:N` after the N-th update of the
weights, before the moving average knows of it; `file:N` as the N-th file of a checkpoint is on the
disk; `saved:N` after the N-th checkpoint. `=STOP` sends SIGSTOP instead, so that something can be
done meanwhile. `@RANK` at the end picks one process. The signal is real: only its moment is
arranged.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dgm.common.errors import UserError  # noqa: E402
from dgm.training import checkpoint  # noqa: E402
from dgm.training.ddp import DataParallelNet  # noqa: E402
from dgm.training.zero import DeepSpeedPartitioned, DeepSpeedReplicated  # noqa: E402

WRAPPED = DataParallelNet, DeepSpeedReplicated, DeepSpeedPartitioned


def after(
    function: Callable[..., Any], calls: int, action: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Wrap a function so that the result of the `calls`-th call passes through `action`."""
    done = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = function(*args, **kwargs)
        done += 1
        return action(result) if done == calls else result

    return call


def send(number: int) -> Callable[[Any], Any]:
    """Return an action that sends a signal to this process."""

    def action(result: Any) -> Any:
        os.kill(os.getpid(), number)
        return result

    return action


def fail(error: Exception) -> Callable[[Any], Any]:
    """Return an action that raises an error."""

    def action(result: Any) -> Any:
        raise error

    return action


def move_clock(seconds: int) -> Callable[[Any], Any]:
    """Return an action that moves the clock."""

    def action(result: Any) -> Any:
        ctypes.CDLL(None).move_clock(ctypes.c_long(seconds))
        return result

    return action


def arrange_in_forward(kind: str, calls: int, option: str) -> None:
    """Patch the backward pass, which calls the forward pass."""
    if kind in ("fault", "mistake"):
        error = RuntimeError if kind == "fault" else UserError
        action = fail(error(f"a {kind} of this process alone"))
    elif kind == "nan":
        action = functools.partial(operator.mul, float("nan"))
    elif kind == "clock":
        action = move_clock(int(option or -3600))
    else:
        default = "TERM" if kind == "term" else "KILL"
        action = send(signal.Signals[f"SIG{option or default}"])
    forward = after(lambda loss: loss(), calls, action)

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, loss, sync: original(self, lambda: forward(loss), sync)

    for wrapped in WRAPPED:
        wrapped.forward = patched(wrapped.forward)


def arrange(kind: str, calls: int, option: str) -> None:
    """Patch the function after which something is to happen."""
    if kind in ("forward", "term", "fault", "mistake", "nan", "clock"):
        arrange_in_forward(kind, calls, option)
        return
    owners: dict[str, tuple[list[Any], str]] = {
        "update": ([*WRAPPED], "clip_and_step"),
        "file": ([checkpoint], "_write_file"),  # called for every file of a checkpoint
        "saved": ([checkpoint], "write"),
    }
    action = send(signal.Signals[f"SIG{option or 'KILL'}"])
    owned_by, name = owners[kind]
    for owner in owned_by:
        setattr(owner, name, after(getattr(owner, name), calls, action))


def main() -> None:
    """Arrange the moment, then run the script."""
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
