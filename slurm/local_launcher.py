"""Start the processes of a run on this machine: `python -m slurm.local_launcher COUNT COMMAND ...`.

As srun does on a cluster, it forwards signals and ends all processes after one has failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

_GRACE_S = 10.0  # until the others are killed after one has failed


def main() -> int:
    """Run COUNT processes; return the highest of their exit codes."""
    count, *command = sys.argv[1:]
    processes: list[subprocess.Popen] = []

    def forward(number: int, frame: object = None) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def ignore_request() -> None:  # until the trainer installs its handler, as on a cluster
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, forward)
    for rank in range(int(count)):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **(variables if count != "1" else {})}
        processes.append(subprocess.Popen(command, env=env, preexec_fn=ignore_request))
    failed_at = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
            forward(signal.SIGKILL)
        time.sleep(0.05)
    return max(code if code >= 0 else 128 - code for code in (p.wait() for p in processes))


if __name__ == "__main__":
    sys.exit(main())
