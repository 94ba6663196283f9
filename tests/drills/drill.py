"""Break things, and check that promises hold: `python -m tests.drills.drill [--short]`.

It ends with a table: each fault, how often it was tried, whether what is promised was kept, the
most images of training that had to be done again, and the longest time from the fault to the end
of what it met. Exit code 1 where a promise was broken; the folder of that try is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.drills.faults import FAULTS
from tests.drills.lab import BrokenPromise, Fault, Lab, NotPossible, Outcome, opened

HEADER = ("fault", "tried", "promise", "held", "most images lost", "longest, s")


@dataclass
class Row:
    """The outcome of all attempts of a fault."""

    fault: str
    promise: str
    tried: int = 0
    images_lost: int = 0
    seconds: float = 0.0
    took_s: float = 0.0  # all its tries
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    not_possible: str = ""

    @property
    def held(self) -> str:
        """Return whether the promise was held."""
        if self.not_possible:
            return f"not possible here: {self.not_possible}"
        return f"broken {len(self.broken)} times" if self.broken else "yes"

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of one attempt."""
        self.images_lost = max(self.images_lost, outcome.images_lost)
        self.seconds = max(self.seconds, outcome.seconds)
        if outcome.note:
            self.notes.append(outcome.note)


def try_fault(fault: Fault, lab: Lab, tries: int, seed: int) -> Row:
    """Create a fault so many times; the draws of an attempt depend on seed, name and number."""
    row = Row(fault.name, fault.promise)
    began = time.monotonic()
    for number in range(tries):
        random = Random(f"{seed} {fault.name} {number}")
        before = set((lab.folder / "tries").iterdir())
        try:
            row.add(fault.attempt(lab, random, number))
            row.tried += 1
        except NotPossible as reason:
            row.not_possible = str(reason)
            break
        except BrokenPromise as broken:
            row.tried += 1
            kept = sorted(set((lab.folder / "tries").iterdir()) - before)
            folders = " ".join(map(str, kept))
            row.broken.append(f"try {number}: {broken}\n  kept: {folders}\n  said: {lab.output}")
        else:
            for path in set((lab.folder / "tries").iterdir()) - before:
                shutil.rmtree(path)
        finally:
            lab.clear()
    row.took_s = time.monotonic() - began
    return row


def table(rows: Iterable[Row]) -> str:
    """Write the table in Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for row in rows:
        cells = [row.fault, str(row.tried), row.promise, row.held]
        cells += [str(row.images_lost), f"{row.seconds:.1f}"] if row.tried else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choose(only: str | None) -> Sequence[Fault]:
    """Choose faults by the beginnings of their names."""
    if only is None:
        return FAULTS
    names = only.split(",")
    for name in names:
        if not any(fault.name.startswith(name) for fault in FAULTS):
            known = ", ".join(fault.name for fault in FAULTS)
            raise SystemExit(f"error: --only {name} is no fault: choose from {known}")
    return [fault for fault in FAULTS if fault.name.startswith(tuple(names))]


def main(arguments: Sequence[str]) -> int:
    """Create faults; return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills.drill", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few tries of each")
    parser.add_argument("--only", help="faults, by the beginnings of their names, with commas")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--json", type=Path, help="file for the figures")
    asked = parser.parse_args(arguments)
    faults = choose(asked.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unmounting all
    folder = Path(tempfile.mkdtemp(prefix="dgm-drill-"))
    rows: list[Row] = []
    began = time.monotonic()
    try:
        with opened(folder) as lab:
            for fault in faults:
                tries = fault.short if asked.short else fault.long
                if tries > 0:
                    rows.append(try_fault(fault, lab, tries, asked.seed))
                    say(rows[-1])
    finally:  # also where it was interrupted
        took_s = time.monotonic() - began
        print(f"\n{table(rows)}\n\nin {took_s:.0f} s")
        broken = any(row.broken for row in rows)
        if not broken:
            shutil.rmtree(folder, ignore_errors=True)
    if asked.json:
        found = {"took_s": took_s, "rows": [dataclasses.asdict(row) for row in rows]}
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if broken:
        print(f"kept: {folder}", file=sys.stderr)
    return 1 if broken else 0


def say(row: Row) -> None:
    """Print the outcome of a fault."""
    print(f"{row.fault}: {row.tried} tries, held: {row.held} ({row.took_s:.0f} s)", flush=True)
    for note in dict.fromkeys(row.notes):
        print(f"  {note}", flush=True)
    for broken in row.broken:
        print(f"  BROKEN {broken}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
