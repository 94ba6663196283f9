"""Break things and check the promises: `python -m tests.drills.drill [--short] [--only NAMES]`.

This runs test_drill.py with many attempts per fault and ends with a table: each fault, the number
of attempts, whether the promise was held, the most images that a run trained on again, and the
longest time from the fault to the end of the process. If a promise was broken, the exit code is 1
and the folder of that attempt is kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.drills.faults import FAULTS


def main() -> int:
    """Run the drill in pytest."""
    parser = argparse.ArgumentParser(prog="python -m tests.drills.drill", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few attempts each")
    parser.add_argument("--only", default="", help="first words of faults, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the times and places")
    options = parser.parse_args()
    for name in options.only.split(","):
        if not any(fault.name.startswith(name) for fault in FAULTS):
            known = ", ".join(fault.name for fault in FAULTS)
            raise SystemExit(f"error: --only {name} is no fault: choose from {known}")
    os.environ["DGM_DRILL"] = "short" if options.short else "long"
    os.environ |= {"DGM_DRILL_ONLY": options.only, "DGM_DRILL_SEED": str(options.seed)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that disks are unmounted
    tests = str(Path(__file__).with_name("test_drill.py"))
    return pytest.main([tests, "-m", "long", "-o", "tmp_path_retention_policy=failed"])


if __name__ == "__main__":
    sys.exit(main())
