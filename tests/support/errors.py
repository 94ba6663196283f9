"""Error messages of scripts."""

from __future__ import annotations

from warm_processes import Result


def error_of(done: Result) -> str:
    """Return the error of a script that ended with code 2: its only line except warnings."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), done
    return lines[0]
