"""Inject faults, and check that promises hold: `python -m tests.drills.drill [--short]`.

Prints a table: each fault, the number of attempts, whether the promise was held, the largest number
of images that had to be repeated, and the longest time from the fault to the end of the disturbed
process. Exit code 1 if a promise was broken; the folder of that attempt is kept.
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
from tests.drills.lab import BrokenPromise, Fault, Lab, NotPossible, Outcome, open_lab

HEADER = ("fault", "tried", "promise", "held", "images repeated, at most", "longest time, s")


@dataclass
class Row:
    """The outcome of all attempts of a fault."""

    fault: str
    promise: str
    tried: int = 0
    images_lost: int = 0
    seconds: float = 0.0
    took_s: float = 0.0  # duration of all attempts
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


def try_fault(fault: Fault, lab: Lab, attempts: int, seed: int) -> Row:
    """Inject a fault several times; the draws depend on seed, fault name and attempt number."""
    row = Row(fault.name, fault.promise)
    began = time.monotonic()
    for number in range(attempts):
        random = Random(f"{seed} {fault.name} {number}")
        before = set((lab.folder / "attempts").iterdir())
        try:
            row.add(fault.attempt(lab, random, number))
            row.tried += 1
        except NotPossible as reason:
            row.not_possible = str(reason)
            break
        except BrokenPromise as broken:
            row.tried += 1
            kept = sorted(set((lab.folder / "attempts").iterdir()) - before)
            folders = " ".join(map(str, kept))
            row.broken.append(
                f"attempt {number}: {broken}\n  kept: {folders}\n  output: {lab.output}"
            )
        else:
            for path in set((lab.folder / "attempts").iterdir()) - before:
                shutil.rmtree(path)
        finally:
            lab.clear()
    row.took_s = time.monotonic() - began
    return row


def table(rows: Iterable[Row]) -> str:
    """Return the table in Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for row in rows:
        cells = [row.fault, str(row.tried), row.promise, row.held]
        cells += [str(row.images_lost), f"{row.seconds:.1f}"] if row.tried else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choose(only: str | None) -> Sequence[Fault]:
    """Return the faults whose names begin with one of `only`, separated by commas; None: all."""
    if only is None:
        return FAULTS
    names = only.split(",")
    for name in names:
        if not any(fault.name.startswith(name) for fault in FAULTS):
            known = ", ".join(fault.name for fault in FAULTS)
            raise SystemExit(f"error: --only {name} is not a fault: choose from {known}")
    return [fault for fault in FAULTS if fault.name.startswith(tuple(names))]


def main(arguments: Sequence[str]) -> int:
    """Inject the chosen faults; return 1 if a promise was broken, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills.drill", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few attempts of each fault")
    parser.add_argument("--only", help="beginnings of fault names, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and places")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(arguments)
    faults = choose(args.only)
    # An exit, so that disks are unmounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="dgm-drill-"))
    rows: list[Row] = []
    began = time.monotonic()
    try:
        with open_lab(folder) as lab:
            for fault in faults:
                attempts = fault.short if args.short else fault.long
                if attempts > 0:
                    rows.append(try_fault(fault, lab, attempts, args.seed))
                    print_row(rows[-1])
    finally:  # also if interrupted
        took_s = time.monotonic() - began
        print(f"\n{table(rows)}\n\nin {took_s:.0f} s")
        broken = any(row.broken for row in rows)
        if not broken:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        found = {"took_s": took_s, "rows": [dataclasses.asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if broken:
        print(f"kept: {folder}", file=sys.stderr)
    return 1 if broken else 0


def print_row(row: Row) -> None:
    """Print the outcome of a fault."""
    print(f"{row.fault}: {row.tried} attempts, held: {row.held} ({row.took_s:.0f} s)", flush=True)
    for note in dict.fromkeys(row.notes):
        print(f"  {note}", flush=True)
    for broken in row.broken:
        print(f"  BROKEN {broken}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
