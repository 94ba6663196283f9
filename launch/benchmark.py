"""Measure the speed of the parts: `python launch/benchmark.py data`."""

from dgm.cli.benchmark import main
from dgm.cli.entry import run

if __name__ == "__main__":
    run(main)
