"""What the end of a run's processes means, and what comes next."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from dgm.common.exit_codes import DONE, FAULT, MISTAKE, STOPPED

# The trainers' exit codes.
_DIED_OF_REQUEST = 128 + signal.SIGUSR2  # before the training had begun to listen


@dataclass(frozen=True)
class Verdict:
    """How a start ended, what comes next, and the job's exit code where nothing does."""

    name: Literal["done", "mistake", "stopped", "fault"]
    next: Literal["nothing", "requeue", "again", "give up"]
    code: int


def judge(
    code: int, said: list[int], asked: bool, progress: bool, faults: int, max_faults: int
) -> Verdict:
    """Judge a start by srun's exit code and by those that the processes left behind.

    srun gives the highest code, also that of processes which it ended after the first failed, so
    what the processes `said` counts for more. A fault after `progress` (a new checkpoint) is met by
    starting again at once, on the same nodes; one without by waiting for others in the queue, until
    `max_faults` starts in a row came to nothing.
    """
    if code == DONE:
        return Verdict("done", "nothing", DONE)
    if MISTAKE in said:
        return Verdict("mistake", "nothing", MISTAKE)
    if STOPPED in said or asked or code in (STOPPED, _DIED_OF_REQUEST, -signal.SIGUSR2):
        return Verdict("stopped", "requeue", STOPPED)
    if progress:
        return Verdict("fault", "again", FAULT)
    if faults + 1 < max_faults:
        return Verdict("fault", "requeue", FAULT)
    return Verdict("fault", "give up", FAULT)
