"""Run a script whose output goes to a reader that ends: `python ends_reading.py BYTES SCRIPT ...`.

The reader is a process of its own at the other end of a pipe; it reads BYTES bytes and ends.
"""

from __future__ import annotations

import os
import runpy
import sys


def attach_reader(count: int) -> None:
    """Connect stdout and stderr to a pipe whose reader ends after `count` bytes."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        while count > 0 and (part := os.read(reading, count)):
            count -= len(part)
        os._exit(0)
    os.close(reading)
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)


if __name__ == "__main__":
    attach_reader(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
