"""Measure trained runs: `python launch/evaluate.py runs/a runs/b`."""

from dgm.cli.entry import run
from dgm.cli.evaluate import main

if __name__ == "__main__":
    run(main)
