"""Start scripts in processes that have already imported torch (and MODULEs), which saves seconds.

    python warm.py SOCKET [MODULE ...]

Each connection asks for one script in a line of JSON: `words` (path and arguments), `processes`,
`cwd`, more `environment`, and files for `stdout` and `stderr`. A copy of this process is forked for
each process of the script. A first answer gives their `pids` and their `group`, a second their exit
codes, negative where a signal ended one. Several processes find each other by the variables that
torchrun sets; with `terminate_others` the first that fails terminates the others, as with torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch._dynamo
import torch._inductor.cudagraph_trees  # every run imports it
import torch.utils.tensorboard  # noqa: F401

import dgm.cli.train_ddpm  # noqa: F401


def serve(path: str) -> None:
    """Answer connections until killed, each in a fork of its own."""
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}.new")
        server.listen()
        os.rename(f"{path}.new", path)  # once the path exists, clients can connect
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks are not waited for
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                with contextlib.suppress(BrokenPipeError):  # the client is gone
                    answer(connection)
                os._exit(1)
            connection.close()


def answer(connection: socket.socket) -> None:
    """Fork the processes of one script, wait for them and send their exit codes."""
    os.setsid()
    with connection, connection.makefile("rw") as stream:
        request = json.loads(stream.readline())
        running: dict[int, int] = {}
        for rank in range(request["processes"]):
            child = os.fork()
            if child == 0:
                connection.detach()
                run_as_rank(request, rank)
            running[child] = rank
        stream.write(json.dumps({"group": os.getpid(), "pids": list(running)}) + "\n")
        stream.flush()
        codes = [0] * len(running)
        while running:
            child, status = os.wait()
            rank = running.pop(child)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank] != 0 and request["terminate_others"]:
                for other in running:
                    os.kill(other, signal.SIGTERM)
        stream.write(json.dumps(codes) + "\n")
        stream.flush()
    os._exit(0)


def run_as_rank(request: dict[str, Any], rank: int) -> NoReturn:
    """Run the script as if Python had just been started with these words."""
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(name, flags), number)
    if request["processes"] > 1:
        count = str(request["processes"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count,
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]), OMP_NUM_THREADS="1",
        )  # fmt: skip
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Skip finalization, which takes longer with torch than most of these scripts.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    serve(sys.argv[1])
