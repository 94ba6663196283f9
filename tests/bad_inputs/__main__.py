"""Run the cases, or those whose command holds a word of the command line; print a table."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.bad_inputs import CASES
from tests.bad_inputs.world import World
from tests.drills import warm


def run_forked(*words: object, cwd: Path, environment: dict[str, str]) -> Any:
    """Run a script in a copy of this process, which has imported what it needs."""
    with tempfile.TemporaryDirectory(prefix="said-") as said:
        request = {
            "words": [str(word) for word in words], "processes": 1, "cwd": str(cwd),
            "environment": environment,
            "stdout": f"{said}/stdout", "stderr": f"{said}/stderr",
        }  # fmt: skip
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            warm.become(request, 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(Path(said) / name).read_text() for name in ("stdout", "stderr")]
    return SimpleNamespace(code=code, stdout=texts[0], stderr=texts[1])


def main() -> int:
    """Try out the cases; say how many were not answered as promised."""
    wanted = sys.argv[1:]
    cases = [c for c in CASES if not wanted or any(word in c.command for word in wanted)]
    wrong = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as place:
        environment = {"XDG_CACHE_HOME": f"{place}/cache", "CUDA_VISIBLE_DEVICES": ""}
        world = World(
            Path(place) / "here",
            lambda *words, cwd: run_forked(*words, cwd=cwd, environment=environment),
        )
        print("| command | line | exit code |\n|---|---|---|")
        for case in cases:
            done, found = world.try_out(case)
            said = " ".join(done.stderr.split()).replace(f"{world.folder}/", "").replace("|", "\\|")
            print(f"| `{case.command}` | {said[:600]} | {done.code} |", flush=True)
            if found:
                wrong += 1
                print(f"WRONG: {case.command}: {'; '.join(found)}", file=sys.stderr, flush=True)
    took = time.monotonic() - began
    print(f"\n{len(cases)} bad inputs, {wrong} of them not answered as promised; {took:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
