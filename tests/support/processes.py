"""Start scripts in processes that have imported torch (see warm.py), send signals, find ports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """Output and exit code of a script; of several processes the first code that is not 0."""

    code: int
    stdout: str
    stderr: str


class Running:
    """A script that was started by `Warm.start`."""

    def __init__(self, connection: socket.socket, output: Path, request: Mapping[str, object]):
        self.connection, self.output = connection, output
        self.stream = connection.makefile("rw")
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        answer = json.loads(self.stream.readline())
        self.group: int = answer["group"]
        self.pid: int = answer["pids"][0]

    def wait(self, timeout: float) -> Result:
        """Wait for the end; after the timeout kill all processes and raise TimeoutError."""
        self.connection.settimeout(timeout)
        try:
            codes = json.loads(self.stream.readline())
        except TimeoutError:
            self.kill()
            raise
        finally:
            self.stream.close()
            self.connection.close()
        stdout, stderr = ((self.output / name).read_text() for name in ("stdout", "stderr"))
        return Result(next((code for code in codes if code), 0), stdout, stderr)

    def kill(self) -> None:
        """Kill all processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


class Warm:
    """A server that has imported torch and more modules, and forks itself for each script."""

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str] = ()):
        self.path = str(folder / "socket")
        command = [sys.executable, Path(__file__).with_name("warm.py"), self.path, *modules]
        self.process = subprocess.Popen(command, env=environment)

    def start(
        self,
        words: Sequence[object],
        output: Path,
        cwd: Path,
        processes: int = 1,
        variables: Mapping[str, str] | None = None,
    ) -> Running:
        """Start `python WORDS`, which writes to `stdout` and `stderr` in the folder `output`."""
        while not os.path.exists(self.path):
            assert self.process.poll() is None, "warm.py ended early"
            time.sleep(0.05)
        streams = {name: str(output / name) for name in ("stdout", "stderr")}
        for path in streams.values():
            Path(path).touch()
        request = {
            "words": [str(word) for word in words],
            "processes": processes,
            "port": free_port(),
            "environment": dict(variables or {}),
            "cwd": str(cwd),
            **streams,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        return Running(connection, output, request)

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()


def plain_environment(cache: Path) -> dict[str, str]:
    """Return the environment variables of a user without a GPU."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TRITON_INTERPRET"):
        env.pop(name, None)
    env["PYTHONPATH"] = str(ROOT)  # the code beside the tests, whatever is installed
    env["OMP_NUM_THREADS"] = "1"  # tests share the cores
    # Several tests share the cores: a thread that spins while it waits would block the others.
    env["OMP_WAIT_POLICY"] = "passive"
    env["DS_ACCELERATOR"] = "cpu"  # as the engine sets it without a GPU
    return env


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_all(launcher: subprocess.Popen, workers: Iterable[psutil.Process] = ()) -> None:
    """Kill a process and its descendants; workers of a launcher have sessions of their own."""
    found = list(workers)
    if launcher.poll() is None:
        found += psutil.Process(launcher.pid).children(recursive=True)
        launcher.kill()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
