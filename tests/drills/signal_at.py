"""Run a script that sends itself a signal at a chosen moment: SIGKILL, or SIGTERM for `term`.

    python signal_at.py MOMENT launch/train_ddpm.py ...

Moments, N counted from the start of the process: `forward:N` after the N-th forward pass of the
training, before its gradient; `term:N` the same; `fault:N` raises an error there instead, with
`=TERM` followed by a SIGTERM once the error leaves the script, as a launcher sends; `mistake:N`
raises one of the user's, `nan:N` makes the loss no number, and `clock:N` moves the clock (see
moved_clock.cpp) by -3600 s, `clock:N=SECONDS` by others; `update:N` after the N-th update of the
weights, before the moving average knows of it; `file:N` as the N-th file of a checkpoint is on the
disk; `saved:N` after the N-th checkpoint. `=STOP` sends SIGSTOP instead, so that something can be
done meanwhile. `@RANK` at the end picks one process. The signal is real: only its moment is
arranged.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dgm.errors import UserError  # noqa: E402
from dgm.train import checkpoint  # noqa: E402
from dgm.train.engine import Engine  # noqa: E402


def signal_after(
    function: Callable[..., Any], calls: int, number: int = signal.SIGKILL
) -> Callable[..., Any]:
    """Wrap a function so that the process gets a signal as the `calls`-th call returns."""
    done = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = function(*args, **kwargs)
        done += 1
        if done == calls:
            os.kill(os.getpid(), number)
        return result

    return call


def fault_after(function: Callable[..., Any], calls: int, error: Exception) -> Callable[..., Any]:
    """Wrap a function so that the `calls`-th call raises an error."""
    done = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == calls:
            raise error
        return function(*args, **kwargs)

    return call


def changed_after(
    function: Callable[..., Any], calls: int, change: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Wrap a function so that what the `calls`-th call returns is changed."""
    done = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        result = function(*args, **kwargs)
        return change(result) if done == calls else result

    return call


def move_clock(seconds: int) -> Callable[[Any], Any]:
    """Give what moves the clock, and passes a result on."""

    def move(result: Any) -> Any:
        ctypes.CDLL(None).move_clock(ctypes.c_long(seconds))
        return result

    return move


def arrange_in_forward(kind: str, calls: int, how: str) -> None:
    """Patch the backward pass, which is given the forward pass that it is to follow."""
    errors = {"fault": RuntimeError, "mistake": UserError}
    backward = Engine.backward

    def forward(loss: Callable[[], Any]) -> Any:
        return loss()

    if kind in errors:
        error = errors[kind](f"a {kind} of this process alone")
        forwards = fault_after(forward, calls, error)
    elif kind == "nan":
        forwards = changed_after(forward, calls, lambda loss: loss * float("nan"))
    elif kind == "clock":
        forwards = changed_after(forward, calls, move_clock(int(how or -3600)))
    else:
        default = "TERM" if kind == "term" else "KILL"
        forwards = signal_after(forward, calls, signal.Signals[f"SIG{how or default}"])
    Engine.backward = lambda self, net, loss, last: backward(
        self, net, lambda: forwards(loss), last
    )


def arrange(kind: str, calls: int, how: str) -> None:
    """Patch the one function that the moment follows."""
    if kind in ("forward", "term", "fault", "mistake", "nan", "clock"):
        arrange_in_forward(kind, calls, how)
        return
    number = signal.Signals[f"SIG{how or 'KILL'}"]
    if kind == "update":
        Engine.update = signal_after(Engine.update, calls, number)
    elif kind == "file":
        # Every file of a checkpoint is brought to the disk by this one function.
        checkpoint._sync_file = signal_after(checkpoint._sync_file, calls, number)
    elif kind == "saved":
        checkpoint.write = signal_after(checkpoint.write, calls, number)
    else:
        raise SystemExit(f"unknown moment {kind}")


def main() -> None:
    """Arrange the moment, then be the script."""
    moment, _, rank = sys.argv[1].partition("@")
    moment, _, how = moment.partition("=")
    kind, calls = moment.split(":")
    if rank in ("", os.environ.get("RANK", "0")):
        arrange(kind, int(calls), how)
    sys.argv = sys.argv[2:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except RuntimeError:
        if (kind, how) == ("fault", "TERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        raise


if __name__ == "__main__":
    main()
