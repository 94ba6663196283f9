"""Moving the clock by an hour during a run."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from random import Random

from tests.drills.lab import HERE, SIGNAL_AT, STEPS, Fault, Lab, NotPossible, Outcome
from tests.support.warm_processes import Warm


def warm_with_own_clock(lab: Lab) -> Warm:
    """Return a `Warm` whose processes have a clock that can be moved, created on first use."""

    def start() -> Warm:
        if shutil.which("g++") is None:
            raise NotPossible("there is no g++")
        library = lab.folder / "moved_clock.so"
        source = HERE / "moved_clock.cpp"
        command = ["g++", "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)
        return lab.new_warm({"LD_PRELOAD": str(library)})

    return lab.once("own clock", start)


def move_clock(lab: Lab, random: Random, number: int) -> Outcome:
    """Move the clock back or forth, alternating between attempts."""
    seconds = (-3600, 3600)[number % 2]
    run = lab.new()
    step = random.randrange(1, STEPS)
    words = [SIGNAL_AT, f"clock:{step}={seconds}", *lab.words(run)]
    began = time.monotonic()
    result = lab.end(lab.start(words, warm=warm_with_own_clock(lab)))
    lab.expect(result.code == 0, f"it ended with {result.code}")
    ended = time.monotonic()
    lab.expect_same(run)
    lab.check_run(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [line["wall_s"] for line in lines]
    rising = all(a <= b for a, b in itertools.pairwise(times))
    lab.expect(rising and times[-1] < 60, f"wall_s is {times}")
    rates = [line["time/images_per_s"] for line in lines]
    lab.expect(all(0 < rate < 1e6 for rate in rates), f"images/s are {rates}")
    return Outcome(0, ended - began)


FAULTS = (
    Fault(
        "clock moved by an hour, back or forth", "same bytes, times plausible", 2, 10, move_clock
    ),
)
