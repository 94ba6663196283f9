"""What a job does when the processes of its run have ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from dgm.common.exit_codes import DONE, FAULT, MISTAKE, STOPPED

_KILLED_BY_REQUEST = 128 + signal.SIGUSR2  # before the trainer had installed its handler


@dataclass(frozen=True)
class Decision:
    """How a start ended, what the job does next, and its exit code if it ends here."""

    outcome: Literal["done", "mistake", "stopped", "fault"]
    action: Literal["nothing", "requeue", "again", "give up"]
    exit_code: int


def decide(
    exit_code: int,
    rank_codes: list[int],
    stop_requested: bool,
    progress: bool,
    failures: int,
    max_faults: int,
) -> Decision:
    """Return what to do after a start, from srun's exit code and those that the ranks recorded.

    srun returns the highest code, even of a process that srun killed after the first failure,
    so `rank_codes` take precedence. A fault after `progress` (a new checkpoint) is restarted at
    once on the same nodes; one without progress is requeued, until `max_faults` starts in a row
    (`failures` before this one) have failed.
    """
    if exit_code == DONE:
        return Decision("done", "nothing", DONE)
    if MISTAKE in rank_codes:
        return Decision("mistake", "nothing", MISTAKE)
    requested = (STOPPED, _KILLED_BY_REQUEST, -signal.SIGUSR2)
    if STOPPED in rank_codes or stop_requested or exit_code in requested:
        return Decision("stopped", "requeue", STOPPED)
    if progress:
        return Decision("fault", "again", FAULT)
    return Decision("fault", "requeue" if failures + 1 < max_faults else "give up", FAULT)
