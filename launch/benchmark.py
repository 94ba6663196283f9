"""Run a benchmark: `python launch/benchmark.py data`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
