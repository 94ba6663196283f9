"""Run the cases whose command contains a word of the command line; print each error message."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.bad_inputs import CASES
from tests.bad_inputs.world import World
from tests.drills import warm


def run_forked(*words: object, cwd: Path) -> Any:
    """Run a script in a copy of this process, which has imported torch; return code and stderr."""
    output = {name: str(cwd.parent / name) for name in ("stdout", "stderr")}
    for path in output.values():
        Path(path).write_text("")
    environment = {"XDG_CACHE_HOME": str(cwd.parent / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    request = {
        "words": [str(word) for word in words], "processes": 1, "cwd": str(cwd),
        "environment": environment, **output,
    }  # fmt: skip
    child = os.fork()
    if child == 0:
        warm.become(request, 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return SimpleNamespace(code=code, stderr=Path(output["stderr"]).read_text())


def main() -> int:
    """Print a table of commands and error messages; return 1 if one is not as it should be."""
    words = sys.argv[1:]
    cases = [case for case in CASES if not words or any(word in case.command for word in words)]
    # Not a TemporaryDirectory, which each copy of this process would remove when it exits.
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    world, num_wrong = World(folder / "world", run_forked), 0
    print("| command | error |\n|---|---|")
    try:
        for case in cases:
            try:
                message = world.check(case).replace(f"{world.folder}/", "")
            except AssertionError as error:
                message, num_wrong = f"WRONG: {error}", num_wrong + 1
            print(f"| `{case.command}` | {message[:600].replace('|', chr(92) + '|')} |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{len(cases)} bad inputs, {num_wrong} not answered as they should be")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
