"""Run scripts by drills/warm.py, in processes that have imported torch already."""

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

ROOT = Path(__file__).resolve().parents[2]
WARM = ROOT / "tests" / "drills" / "warm.py"


@dataclass(frozen=True)
class Result:
    """A script's output and exit codes; `code` is the first that is not 0, by rank."""

    code: int
    stdout: str
    stderr: str
    codes: tuple[int, ...] = ()


class Running:
    """A running script."""

    def __init__(self, connection: socket.socket, output: Path):
        self.connection, self.output = connection, output
        self.stream = connection.makefile("rw")

    def ask(self, request: Mapping[str, object]) -> None:
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        answer = json.loads(self.stream.readline())
        self.group: int = answer["group"]
        self.pids: list[int] = answer["pids"]  # by rank

    def wait(self, timeout: float) -> Result:
        """Wait for its end; kill it and raise TimeoutError if that does not come."""
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
        stdout, stderr = ((self.output / name).read_text() for name in ("stdout", "stderr"))
        return Result(code, stdout, stderr, tuple(codes))

    def kill(self) -> None:
        """Kill all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


class Warm:
    """A process that has imported torch and more, and is forked for each script."""

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str] = ()):
        self.path = str(folder / "socket")
        command = [sys.executable, str(WARM), self.path, *modules]
        self.process = subprocess.Popen(command, env=environment)

    def start(
        self,
        words: Sequence[object],
        output: Path,
        cwd: Path,
        processes: int = 1,
        port: int = 0,
        variables: Mapping[str, str] | None = None,
        takes_down: bool = True,
    ) -> Running:
        """Start `python WORDS`; its output goes to files in the folder `output`.

        Unless `takes_down`, the others have to notice the death of one process themselves.
        """
        self.wait_until_warm()
        for name in ("stdout", "stderr"):
            (output / name).touch()
        request = {
            "words": [str(word) for word in words],
            "processes": processes,
            "port": port,
            "environment": dict(variables or {}),
            "cwd": str(cwd),
            "stdout": str(output / "stdout"),
            "stderr": str(output / "stderr"),
            "takes_down": takes_down,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        running = Running(connection, output)
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
    """Return the environment variables of a user without a GPU."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TRITON_INTERPRET"):
        env.pop(name, None)
    env["PYTHONPATH"] = str(ROOT)  # the code beside the tests, whatever is installed
    env["OMP_NUM_THREADS"] = "1"  # tests share the cores
    # Several tests share the cores: a thread that spins as it waits would hold up the others.
    env["OMP_WAIT_POLICY"] = "passive"
    env["DS_ACCELERATOR"] = "cpu"  # as the engine sets it where there is no GPU
    return env
