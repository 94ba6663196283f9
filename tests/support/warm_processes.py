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
        """Wait for the end of the script; after the timeout kill it and raise TimeoutError."""
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
        """Kill all processes of the script."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


class Warm:
    """A process that has imported torch and further modules, and is forked for each script."""

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
        terminate_others: bool = True,
    ) -> Running:
        """Start `python WORDS`; its output goes to files in the folder `output`.

        terminate_others: whether the first process that fails terminates the others, as with
        torchrun; otherwise they have to notice it themselves.
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
            "terminate_others": terminate_others,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        running = Running(connection, output)
        running.ask(request)
        return running

    def wait_until_warm(self) -> None:
        """Wait until the process listens."""
        while not os.path.exists(self.path):
            assert self.process.poll() is None, "warm.py ended early"
            time.sleep(0.05)

    def close(self) -> None:
        """Kill the process."""
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
    env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes for one small net
    env["DS_ACCELERATOR"] = "cpu"  # as the engine does where there is no GPU
    return env
