"""Evaluate trained runs: `python launch/evaluate.py runs/a runs/b`."""

from dgm.cli.entry import run_script

if __name__ == "__main__":
    run_script(__file__)
