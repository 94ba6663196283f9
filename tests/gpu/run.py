"""Check and measure on a GPU within a time limit: `python tests/gpu/run.py SECONDS [--out DIR]`.

Run from the root of the repository, with what `prepare.py` wrote to .gpu/. The most valuable parts
come first; whatever fails, the results so far are in DIR/all.tar.gz and DIR/summary.json. With
`--dry-run` it does the same in small sizes on the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dgm.benchmarks.processes import ROOT
from dgm.common.command_line import Parser, run_command
from dgm.common.errors import UserError
from tests.gpu.parts import FIRST, RESERVE_S, START_S, make_parts
from tests.gpu.processes import CommandError, end_on_signals
from tests.gpu.schedule import Budget, Part, run_parts
from tests.gpu.session import Session

BEGAN = time.monotonic()


def main() -> int:
    """Run the parts; return 0 if all that ran succeeded, else 1."""
    parser = Parser(description=__doc__)
    parser.add_argument("seconds", metavar="SECONDS", type=float, help="time limit, such as 560")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="new folder")
    parser.add_argument(
        "--prepared", type=Path, default=ROOT / ".gpu", help="folder that prepare.py wrote"
    )
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on the CPU")
    args = parser.parse_args()
    budget = Budget(args.seconds, RESERVE_S, BEGAN)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
        session = Session(args.out, Path(scratch), args.prepared, args.dry_run)
        parts = make_parts(session)
        check_seconds(budget.seconds, parts[:FIRST])
        check_out(args.out)
        try:
            session.start(60)
        except CommandError as error:
            raise UserError(f"Python's packages cannot be used here: {error}") from None
        args.out.mkdir(parents=True, exist_ok=True)
        end_on_signals()
        commit = args.prepared / "commit.json"  # used if the copy has no .git
        session.summary |= json.loads(commit.read_text()) if commit.exists() else {}
        session.summary["seconds"] = budget.seconds
        print(json.dumps(session.summary["machine"]), flush=True)
        try:
            run_parts(parts, budget, session.report)
        finally:
            session.summary["took"] = round(budget.elapsed(), 1)
            session.pack()
        print()
        for name, value in session.summary["figures"].items():
            print(f"{name:44} {value:>12,}")
        if failures := session.summary.get("checks", {}).get("failures"):
            print(f"checks that failed: {'; '.join(failures)}")
        print(f"{budget.elapsed():.0f} of {budget.seconds:g} s; {args.out / 'all.tar.gz'}")
        return int(any(part["state"] == "failed" for part in session.summary["parts"].values()))


def check_seconds(seconds: float, first: list[Part]) -> None:
    """Raise UserError if not even the first parts fit into the time."""
    needed = START_S + RESERVE_S + sum(part.min_seconds for part in first)
    if seconds < needed:
        names = ", ".join(part.name for part in first)
        raise UserError(f"SECONDS is {seconds:g}: give {needed:g} or more, which {names} take")


def check_out(out: Path) -> None:
    """Raise UserError if `out` is not a new or empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is not a folder: name another path")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out is {out}, which is not empty: name a new folder, or remove it")


if __name__ == "__main__":
    run_command(main)
