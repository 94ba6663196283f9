"""Break things and check the promises: `python -m tests.drills.drill [--short] [--only NAMES]`.

The result is a table: each fault, the number of attempts, whether the promise was held, the most
images that a run trained on again, and the longest time from the fault to the end of the process.
The exit code is 1 if a promise was broken; the folders of those attempts are kept.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.drills.faults import FAULTS
from tests.drills.lab import Fault, Lab, NotPossible, opened

HEADER = ("fault", "tried", "promise", "held", "images repeated, at most", "longest time, s")


@dataclass
class Row:
    """The outcome of all attempts of a fault."""

    fault: str
    promise: str
    tried: int = 0
    images_repeated: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    not_possible: str = ""

    def cells(self) -> list[str]:
        """Return a row of the table."""
        held = f"broken {len(self.broken)} times" if self.broken else "yes"
        if self.not_possible:
            held = f"not possible here: {self.not_possible}"
        measured = [str(self.images_repeated), f"{self.seconds:.1f}"] if self.tried else ["-", "-"]
        return [self.fault, str(self.tried), self.promise, held, *measured]


def attempt(fault: Fault, lab: Lab, tries: int, seed: int) -> Row:
    """Create a fault so many times; its draws depend on the seed, its name and the attempt."""
    row = Row(fault.name, fault.promise)
    for number in range(tries):
        random = Random(f"{seed} {fault.name} {number}")
        before = set((lab.folder / "tries").iterdir())
        try:
            outcome = fault.attempt(lab, random, number)
        except NotPossible as reason:
            row.not_possible = str(reason)
            break
        except (AssertionError, subprocess.TimeoutExpired) as broken:
            kept = sorted(set((lab.folder / "tries").iterdir()) - before)
            folders = " ".join(map(str, kept))
            row.broken.append(f"try {number}: {broken}\n  kept: {folders}\n  output: {lab.output}")
        else:
            row.images_repeated = max(row.images_repeated, outcome.images_repeated)
            row.seconds = max(row.seconds, outcome.seconds)
            row.notes += [outcome.note] if outcome.note else []
            for path in set((lab.folder / "tries").iterdir()) - before:
                shutil.rmtree(path)
        finally:
            lab.clear()
        row.tried += 1
    return row


def table(rows: Iterable[Row]) -> str:
    """Return the table in Markdown."""
    lines = [f"| {' | '.join(row.cells())} |" for row in rows]
    return "\n".join([f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}", *lines])


def choose(only: str) -> list[Fault]:
    """Return the faults whose names begin with one of these, separated by commas."""
    for name in only.split(","):
        if not any(fault.name.startswith(name) for fault in FAULTS):
            known = ", ".join(fault.name for fault in FAULTS)
            raise SystemExit(f"error: --only {name} is no fault: choose of {known}")
    return [fault for fault in FAULTS if fault.name.startswith(tuple(only.split(",")))]


def main(arguments: Sequence[str]) -> int:
    """Create faults; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills.drill", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few attempts each")
    parser.add_argument("--only", default="", help="first words of faults, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the times and places")
    options = parser.parse_args(arguments)
    faults = choose(options.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unmounts disks
    folder = Path(tempfile.mkdtemp(prefix="dgm-drill-"))
    rows: list[Row] = []
    began = time.monotonic()
    try:
        with opened(folder) as lab:
            for fault in faults:
                if tries := fault.short if options.short else fault.long:
                    rows.append(attempt(fault, lab, tries, options.seed))
                    print(": ".join(rows[-1].cells()[::3]), *dict.fromkeys(rows[-1].notes),
                          *rows[-1].broken, sep="\n  ", flush=True)  # fmt: skip
    finally:  # also after an interrupt
        print(f"\n{table(rows)}\n\nin {time.monotonic() - began:.0f} s")
        broken = any(row.broken for row in rows)
        if broken:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
