"""Scripts run by drills/warm.py, in processes that have imported torch already."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

WARM = Path(__file__).resolve().parents[1] / "drills" / "warm.py"


@dataclass(frozen=True)
class Result:
    """What a script left on the screen; its code is the first that is not 0, by rank."""

    code: int
    stdout: str
    stderr: str
    codes: tuple[int, ...] = ()


class Running:
    """A script that runs."""

    def __init__(self, connection: socket.socket, said: Path):
        self.connection, self.said = connection, said
        self.stream = connection.makefile("rw")

    def ask(self, request: Mapping[str, object]) -> None:
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        told = json.loads(self.stream.readline())
        self.group: int = told["group"]
        self.pids: list[int] = told["pids"]  # by rank

    def wait(self, timeout: float) -> Result:
        """Wait for its end; kills it and raises TimeoutError where that does not come."""
        self.connection.settimeout(timeout)
        try:
            codes = json.loads(self.stream.readline())
        except TimeoutError:
            self.kill()
            raise
        finally:
            self.stream.close()
            self.connection.close()
        code = next((code for code in codes if code), 0)
        stdout, stderr = ((self.said / name).read_text() for name in ("stdout", "stderr"))
        return Result(code, stdout, stderr, tuple(codes))

    def kill(self) -> None:
        """Kill all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


class Warm:
    """A process that has imported torch and more, and is copied for each script."""

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str] = ()):
        self.path = str(folder / "socket")
        command = [sys.executable, str(WARM), self.path, *modules]
        self.process = subprocess.Popen(command, env=environment)

    def start(
        self,
        words: Sequence[object],
        said: Path,
        cwd: Path,
        processes: int = 1,
        port: int = 0,
        variables: Mapping[str, str] | None = None,
        takes_down: bool = True,
    ) -> Running:
        """Start `python WORDS`; what it says goes to files in the folder `said`.

        Unless it `takes_down`, the death of one process is left to the others to notice.
        """
        self.wait_until_warm()
        for name in ("stdout", "stderr"):
            (said / name).touch()
        request = {
            "words": [str(word) for word in words],
            "processes": processes,
            "port": port,
            "environment": dict(variables or {}),
            "cwd": str(cwd),
            "stdout": str(said / "stdout"),
            "stderr": str(said / "stderr"),
            "takes_down": takes_down,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        running = Running(connection, said)
        running.ask(request)
        return running

    def wait_until_warm(self) -> None:
        """Wait until it listens."""
        while not os.path.exists(self.path):
            assert self.process.poll() is None, "warm.py ended early"
            time.sleep(0.05)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def plain_environment(cache: Path) -> dict[str, str]:
    """Give the variables of a user without a GPU."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TRITON_INTERPRET"):
        env.pop(name, None)
    env["OMP_NUM_THREADS"] = "1"  # tests share the cores
    # Several tests share the cores: a thread that spins as it waits would hold up the others.
    env["OMP_WAIT_POLICY"] = "passive"
    env["DS_ACCELERATOR"] = "cpu"  # as the engine sets it where there is no GPU
    return env
