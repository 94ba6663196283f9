"""Run the cases, or those whose command holds a word of the command line; print a table."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.bad_inputs import CASES
from tests.bad_inputs.case import Case
from tests.bad_inputs.world import World
from tests.drills import warm

PATIENCE_S = 60


def run_forked(*words: object, cwd: Path, said: Path, environment: dict[str, str]) -> Any:
    """Run a script in a copy of this process, which has imported what it needs."""
    said.mkdir(exist_ok=True)
    paths = {name: said / name for name in ("stdout", "stderr")}
    for path in paths.values():
        path.write_text("")
    request = {
        "words": [str(word) for word in words], "processes": 1, "cwd": str(cwd),
        "environment": environment, **{name: str(path) for name, path in paths.items()},
    }  # fmt: skip
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE_S)  # which ends it
        warm.become(request, 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return SimpleNamespace(code=code, **{name: path.read_text() for name, path in paths.items()})


def main() -> int:
    """Try out the cases; say how many were not answered as promised."""
    wanted = sys.argv[1:]
    cases = [case for case in CASES if not wanted or any(word in case.shown for word in wanted)]
    # Not a TemporaryDirectory: at its end each copy of this process would remove it.
    place = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    try:
        return try_all(cases, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def try_all(cases: list[Case], place: Path) -> int:
    """Try out cases in a folder; print the table."""
    environment = {"XDG_CACHE_HOME": f"{place}/cache", "CUDA_VISIBLE_DEVICES": ""}
    run = partial(run_forked, said=place / "said", environment=environment)
    world = World(place / "here", run)
    wrong, began = 0, time.monotonic()
    print("| command | line | exit code |\n|---|---|---|")
    for case in cases:
        done, found = world.try_out(case)
        said = " ".join(done.stderr.split()).replace(f"{world.folder}/", "")
        cells = (case.shown, said[:600].replace("|", "\\|"), str(done.code))
        print(f"| {' | '.join(cells)} |", flush=True)
        if found:
            wrong += 1
            print(f"WRONG: {case.shown}: {'; '.join(found)}", file=sys.stderr, flush=True)
    took = time.monotonic() - began
    print(f"\n{len(cases)} bad inputs, {wrong} of them not answered as promised; {took:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
