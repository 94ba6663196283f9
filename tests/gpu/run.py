"""Check and measure on a GPU within a time limit: `python tests/gpu/run.py SECONDS [--out DIR]`.

From the root of the repository, with what `prepare.py` left in .gpu/. The most valuable parts come
first; whatever fails, the results so far are in DIR/all.tar.gz, and a summary in DIR/summary.json.
With `--dry-run` it does the same in small sizes on the CPU.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dgm.common.command_line import Parser
from dgm.common.errors import UserError
from tests.gpu.command import run
from tests.gpu.parts import FIRST, RESERVE_S, START_S, make_parts
from tests.gpu.processes import CommandError, end_on_signals
from tests.gpu.schedule import Budget, Outcome, check_budget, run_parts
from tests.gpu.session import ROOT, Session

BEGAN = time.monotonic()


def main() -> int:
    """Run the parts; 0 where all that ran was well, 1 where something failed."""
    parser = Parser(description=__doc__)
    parser.add_argument("seconds", metavar="SECONDS", help="for all of it, as 560")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="new folder")
    parser.add_argument("--prepared", type=Path, default=ROOT / ".gpu", help="by prepare.py")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on the CPU")
    args = parser.parse_args()
    budget = Budget(read_seconds(args.seconds), RESERVE_S, BEGAN)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
        session = Session(args.out, Path(scratch), args.prepared, args.dry_run)
        parts = make_parts(session)
        check_budget(budget.seconds, parts, START_S + RESERVE_S, FIRST)
        check_out(args.out)
        try:
            session.install_wheels(60)
            session.check_machine(60)
            session.check_packages(30)
        except CommandError as error:
            raise UserError(f"Python's packages cannot be used here: {error}") from None
        args.out.mkdir(parents=True, exist_ok=True)
        end_on_signals()
        session.summary |= {"seconds": budget.seconds, **_commit(args.prepared)}
        print(json.dumps(session.summary["machine"]), flush=True)
        try:
            outcomes = run_parts(parts, budget, session.report)
        finally:
            session.summary["took"] = round(budget.elapsed(), 1)
            session.pack()
        show(session, outcomes, budget)
        states = [part["state"] for part in session.summary["parts"].values()]
        return int("failed" in states)


def read_seconds(text: str) -> float:
    """Read SECONDS; raises UserError where it is no number above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"SECONDS is {text}: give a number of seconds, as 560")
    return seconds


def check_out(out: Path) -> None:
    """Raise UserError where `out` is no new or empty folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is no folder: name another")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out is {out}, which is not empty: name a new folder, or remove it")


def show(session: Session, outcomes: dict[str, Outcome], budget: Budget) -> None:
    """Print the figures and what became of the parts, in short."""
    print(f"\n{'part':24} {'':9} {'seconds':>8}")
    for name, part in session.summary["parts"].items():
        took = f"{part['seconds']:8.1f}" if part["state"] != "left out" else f"{'-':>8}"
        print(f"{name:24} {part['state']:9} {took}  {part['detail'][:90]}")
    print()
    for name, value in session.summary["figures"].items():
        print(f"{name:44} {value:>12,}")
    if failures := session.summary.get("checks", {}).get("failures"):
        print(f"checks that failed: {'; '.join(failures)}")
    print(f"{budget.elapsed():.0f} of {budget.seconds:g} s; {session.out / 'all.tar.gz'}")


def _commit(prepared: Path) -> dict[str, object]:
    """Return the commit that `prepare` wrote down, for a copy without .git."""
    path = prepared / "commit.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    run(main)
